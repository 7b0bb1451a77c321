// Each line of the input is one equation as JSON, and each line of the output its SVG.
const path = require("path");
const [, , mathjax] = process.argv;

const typeset = ({ tex, display }, { startup, tex2svg }) =>
  startup.adaptor.innerHTML(tex2svg(tex, { display }));

require(path.join(mathjax, "node-main.js"))
  .init({
    loader: { load: ["input/tex-full", "output/svg"] },
    tex: { packages: { "[+]": ["textmacros"] } }, // `\_` in `\text{}`
    svg: { fontCache: "none" },
  })
  .then((MathJax) => {
    const lines = require("readline").createInterface({ input: process.stdin });
    lines.on("line", (line) => console.log(typeset(JSON.parse(line), MathJax)));
  });
