"""What the language-model examples share: the text (`data`) and the network (`model`)."""
