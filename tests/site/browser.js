// Opens pages of the site in frames of one window, and leaves what it found as JSON in the document.
const later = (time) => new Promise((resolve) => setTimeout(resolve, time));

const opened = (address) =>
  new Promise((resolve) => {
    const frame = Object.assign(document.createElement("iframe"), { src: address });
    frame.width = WIDTH;
    frame.height = 800;
  frame.style = "position: absolute; top: 0; left: 0"; // what is out of sight is not drawn
    frame.onload = () => resolve(frame);
    document.body.append(frame);
  });

// The last heading of a page that can be scrolled to the top of the window.
const target = ({ contentDocument: page, contentWindow: view }) => {
  const end = page.documentElement.scrollHeight - view.innerHeight;
  const places = [...page.querySelectorAll("article section[id], article dt[id]")].filter((at) => {
    const top = at.getBoundingClientRect().top + view.scrollY;
    return top > view.innerHeight && top < end;
  });
  return places.length ? places.at(-1).id : null;
};

const wide = ({ contentDocument: page }) => page.documentElement.scrollWidth;

const landing = (frame) => {
  const { contentDocument: page, contentWindow: view } = frame;
  const id = decodeURIComponent(view.location.hash.slice(1));
  return page.getElementById(id).getBoundingClientRect().top;
};

const first = ({ contentDocument: page }) => {
  const link = page.querySelector("#search-results li a");
  return link ? link.href.split(/[?#]/)[0] : null;
};

(async () => {
  const found = { landings: {}, results: {}, widths: {} };
  const links = [];
  for (const page of PAGES) {
    const frame = await opened(page);
    const id = target(frame);
    found.widths[page] = wide(frame);
    if (id) links.push(`${page}#${encodeURIComponent(id)}`);
    frame.remove();
  }
  const frames = await Promise.all(links.map(opened));
  const searches = await Promise.all(
    QUERIES.map((query) => opened(`search.html?q=${encodeURIComponent(query)}`)),
  );
  await later(8000);
  links.forEach((link, i) => (found.landings[link] = landing(frames[i])));
  QUERIES.forEach((query, i) => (found.results[query] = first(searches[i])));
  const pre = document.createElement("pre");
  pre.id = "found";
  pre.textContent = JSON.stringify(found);
  document.body.append(pre);
})();
