"""What several of the papers use."""
