(sheet) => {
  const wrong = [];
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) wrong.push(`the page is ${root.scrollWidth} wide, not ${root.clientWidth}`);
  const shown = (element) => element.getClientRects().length > 0 && !element.closest("[hidden]");
  const all = [...document.body.querySelectorAll("*")].filter(shown);
  const told = (element) => `<${element.tagName}> “${(element.textContent || "").slice(0, 60)}”`;
  const box = (element) => element.getBoundingClientRect();

  for (const element of all) {
    const { left, right, height } = box(element);
    if (!element.closest("svg") && (right > root.clientWidth + 1 || left < -1)) wrong.push(`${told(element)} sticks out`);
    if (sheet && getComputedStyle(element).breakInside === "avoid" && height > sheet) {
      wrong.push(`${told(element)} is ${height} high and is not to be broken`);
    }
  }

  // Texts of drawings are within them and do not lie on each other.
  for (const svg of document.querySelectorAll("svg[role]")) {
    const frame = box(svg);
    const texts = [...svg.querySelectorAll("text")].map((text) => [text, box(text)]);
    for (const [text, at] of texts) {
      if (at.left < frame.left - 1 || at.right > frame.right + 1 || at.top < frame.top - 3 || at.bottom > frame.bottom + 3) {
        wrong.push(`${told(text)} sticks out of its drawing`);
      }
    }
    texts.forEach(([text, one], index) => {
      for (const [next, other] of texts.slice(index + 1)) {
        const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
        const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
        if (across > 1 && down > 5) wrong.push(`${told(text)} lies on ${told(next)}`);
      }
    });
  }

  // Contrast of text as WCAG 2 counts it.
  const colour = (text) => (text.match(/[\d.]+/g) || []).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = colour(getComputedStyle(at).backgroundColor);
      if (found.length === 3) return found;
    }
    return [255, 255, 255];
  };
  const seen = new Set();
  for (const element of all) {
    const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!own || element.tagName === "title") continue;
    // What is styled alike looks alike; tables have thousands of cells.
    const named = (at) => `${at.tagName} ${at.getAttribute("class")}`;
    const kind = `${named(element)} in ${named(element.parentElement)} in ${named(element.parentElement.parentElement)}`;
    if (seen.has(kind)) continue;
    seen.add(kind);
    const style = getComputedStyle(element);
    const ink = colour(element.closest("svg") ? style.fill : style.color).slice(0, 3);
    const [high, low] = [light(ink), light(ground(element))].sort((a, b) => b - a);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) wrong.push(`${told(element)} has a contrast of ${contrast.toFixed(2)}`);
  }
  return [...new Set(wrong)].slice(0, 20);
}
