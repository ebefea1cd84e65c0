// What the tests check in a page. Returns the faults as texts.
(() => {
  const faults = [];
  const isSeen = (it) => it.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true }) && !it.closest('.unseen, .skip');
  const nameOf = (it) => `${it.tagName.toLowerCase()}${it.id ? `#${it.id}` : ''}.${it.className} "${(it.innerText ?? '').slice(0, 40)}"`;

  // Nothing is wider than the window.
  const width = document.documentElement.scrollWidth;
  if (width > innerWidth) {
    faults.push(`the page is ${width} px wide`);
    for (const it of document.body.querySelectorAll('*')) {
      if (isSeen(it) && it.getBoundingClientRect().right > innerWidth + 0.5) {
        faults.push(`too far right: ${nameOf(it)}`);
      }
    }
  }
  for (const it of document.querySelectorAll('.scroll')) {
    if (isSeen(it) && it.scrollWidth > it.clientWidth) {
      faults.push(`a table has to be scrolled: ${it.getAttribute('aria-label')} ${it.scrollWidth} > ${it.clientWidth}`);
    }
  }

  // Each text has a contrast of 4.5 to its background.
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 1;
  const context = canvas.getContext('2d', { willReadFrequently: true });
  const rgba = (color) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
  const backOf = (it) => {
    const layers = [];
    for (let at = it; at; at = at.parentElement) {
      layers.push(rgba(getComputedStyle(at).backgroundColor));
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const luminance = (color) => {
    const [r, g, b] = color.slice(0, 3).map((it) => {
      const part = it / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let texts = 0;
  let least = Infinity;
  const check = (it, color, what) => {
    const back = backOf(it);
    const [a, b] = [luminance(over(rgba(color), back)), luminance(back)].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    texts += 1;
    least = Math.min(least, contrast);
    if (contrast < 4.5) {
      faults.push(`contrast ${contrast.toFixed(2)}: ${what} ${nameOf(it)}`);
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const it = walker.currentNode.parentElement;
    if (walker.currentNode.data.trim() && isSeen(it)) {
      check(it, getComputedStyle(it).color, 'text');
    }
  }
  for (const it of document.querySelectorAll('[placeholder], [data-label], option')) {
    const part = it.placeholder ? '::placeholder' : '::before';
    const style = getComputedStyle(it, part);
    if (isSeen(it) && (it.placeholder || style.content !== 'none')) {
      check(it, style.color, part);
    }
  }

  // Names, heads, labels, landmarks.
  for (const it of document.querySelectorAll('a, button, input, select')) {
    const name = it.getAttribute('aria-label') || it.innerText || it.labels?.[0]?.innerText;
    if (isSeen(it) && !name) {
      faults.push(`no name: ${nameOf(it)}`);
    }
  }
  for (const it of document.querySelectorAll('table')) {
    const heads = it.querySelectorAll('thead th[scope=col]').length;
    const rows = [...it.querySelectorAll('tbody tr')];
    if (!it.caption || heads === 0 || rows.some((row) => row.children.length !== heads || !row.querySelector('th[scope=row]'))) {
      faults.push(`a table without caption or heads: ${nameOf(it)}`);
    }
  }
  for (const tag of ['main', 'header', 'h1']) {
    if (document.querySelectorAll(tag).length !== 1) {
      faults.push(`not one ${tag}`);
    }
  }
  const ids = [...document.querySelectorAll('[id]')].map((it) => it.id);
  if (new Set(ids).size !== ids.length) {
    faults.push('an id comes twice');
  }
  return { faults, texts, least };
})();
