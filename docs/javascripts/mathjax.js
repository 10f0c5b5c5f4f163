// Formulas are in the page as TeX, between \( \) and \[ \]: where MathJax can't be fetched they are read as such.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], tags: "none" },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};
