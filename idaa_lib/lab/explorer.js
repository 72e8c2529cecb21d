// What widgets do not say of themselves: a picture's text, and ε in place of its logarithm. And a
// click on a picture chooses the image there, in the menu that a keyboard can use.
(() => {
  if (window.idaaExplorer) return;
  window.idaaExplorer = true;
  const name = () => {
    for (const handle of document.querySelectorAll('.idaa-epsilon .noUi-handle')) {
      const log = Number(handle.getAttribute('aria-valuetext') ?? NaN);
      if (Number.isNaN(log)) continue;
      handle.setAttribute('aria-label', 'ε, the radius of the attack');
      handle.setAttribute('aria-valuetext', `ε = ${Number((10 ** log).toPrecision(3))}`);
    }
    for (const image of document.querySelectorAll('img.idaa-pixels:not([alt])')) {
      const text = image.closest('.idaa-grid')?.querySelector('.idaa-text')?.title;
      if (text) image.alt = text;
    }
  };
  new MutationObserver(name).observe(document.body, {
    subtree: true, childList: true, attributeFilter: ['aria-valuetext'],
  });
  name();
  document.addEventListener('click', (event) => {
    const image = event.target.closest?.('.idaa-still, .idaa-picture, .idaa-pinned');
    const choice = image?.closest('.idaa-explorer')?.querySelector('.idaa-chosen select');
    if (!choice) return;
    const rows = image.closest('.idaa-grid').querySelectorAll('.idaa-row').length;
    choice.selectedIndex = 1 + Math.floor((event.offsetX / image.clientHeight) * rows);
    choice.dispatchEvent(new Event('change', {bubbles: true}));
  });
})();
