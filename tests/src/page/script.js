
(() => {
  const panel = document.getElementById("detail");
  const bar = (event) => event.target.closest("[data-c]");
  const show = (event) => {
    const over = bar(event);
    if (over) {
      panel.textContent = over.querySelector("title").textContent;
      panel.hidden = false;
    }
  };
  for (const figure of document.querySelectorAll(".calls")) {
    const bars = [...figure.querySelectorAll("[data-c]")];
    figure.addEventListener("pointerover", show);
    figure.addEventListener("focusin", show);
    figure.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const at = bars.indexOf(bar(event));
      if (step && bars[at + step]) {
        bars[at + step].focus();
        event.preventDefault();
      }
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") panel.hidden = true;
  });
})();
