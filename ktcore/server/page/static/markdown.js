// A little Markdown as DOM nodes: text never becomes markup, so that no answer can put a script into the page.

function inline(parent, text) {
  const pattern = /(`+)(.+?)\1|\*\*(.+?)\*\*|\*(\S(?:.*?\S)?)\*/g;
  let at = 0;
  for (const found of text.matchAll(pattern)) {
    parent.append(text.slice(at, found.index));
    const [whole, , code, bold, italic] = found;
    const made = document.createElement(code !== undefined ? "code" : bold !== undefined ? "strong" : "em");
    made.textContent = code ?? bold ?? italic;
    parent.append(made);
    at = found.index + whole.length;
  }
  parent.append(text.slice(at));
}

function block(kind, lines) {
  const made = document.createElement(kind);
  lines.forEach((line, i) => {
    if (i) made.append(document.createElement("br"));
    inline(made, line);
  });
  return made;
}

const ITEM = /^\s*(?:[-*+]|(\d+)[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*)$/;

export function markdown(text) {
  const out = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let i = 0; i < lines.length; ) {
    const fence = lines[i].match(/^\s*(```+|~~~+)/);
    if (fence) {
      const end = lines.findIndex((line, j) => j > i && line.trim().startsWith(fence[1]));
      const last = end < 0 ? lines.length : end;
      const pre = document.createElement("pre");
      const code = document.createElement("code");
      code.textContent = lines.slice(i + 1, last).join("\n");
      pre.append(code);
      out.append(pre);
      i = last + 1;
    } else if (HEADING.test(lines[i])) {
      const [, marks, title] = lines[i].match(HEADING);
      out.append(block(`h${Math.min(6, marks.length + 2)}`, [title]));
      i++;
    } else if (ITEM.test(lines[i])) {
      const list = document.createElement(lines[i].match(ITEM)[1] ? "ol" : "ul");
      for (; i < lines.length && ITEM.test(lines[i]); i++) list.append(block("li", [lines[i].match(ITEM)[2]]));
      out.append(list);
    } else if (!lines[i].trim()) {
      i++;
    } else {
      const from = i;
      while (i < lines.length && lines[i].trim() && !ITEM.test(lines[i]) && !HEADING.test(lines[i]) && !/^\s*(```|~~~)/.test(lines[i])) i++;
      out.append(block("p", lines.slice(from, i)));
    }
  }
  return out;
}
