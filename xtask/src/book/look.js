// SPDX-License-Identifier: Apache-2.0
// What does not fit into the window, and texts too small to read, as JSON.
(() => {
  const width = document.documentElement.clientWidth;
  const name = (e) => `${e.tagName.toLowerCase()} "${(e.textContent || '').trim().slice(0, 30)}"`;
  // Whether an element lies in a box that scrolls or hides what is beyond it, and that fits itself.
  const boxed = (e) => {
    for (let box = e.parentElement; box; box = box.parentElement) {
      const overflow = getComputedStyle(box).overflowX;
      if (overflow !== 'visible' && box.getBoundingClientRect().right <= width + 1) return true;
    }
    return false;
  };
  const seen = (e) => {
    const r = e.getBoundingClientRect();
    return r.width > 0 && r.height > 0 && getComputedStyle(e).visibility === 'visible';
  };
  const wide = [...document.querySelectorAll('body *')]
    .filter((e) => seen(e) && e.getBoundingClientRect().right > width + 1 && !boxed(e))
    .map(name);
  // A picture of its own is scaled, and its texts with it.
  const texts = [...document.querySelectorAll('svg text')]
    .filter((e) => seen(e) && parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a < 8.5)
    .map(name);
  const pictures = [...document.querySelectorAll('img[src$=".svg"]')]
    .filter((e) => seen(e) && e.naturalWidth > 0 && e.getBoundingClientRect().width < 0.75 * e.naturalWidth)
    .map((e) => `img ${e.getAttribute('src')}`);
  const small = texts.concat(pictures);
  const overflow = document.documentElement.scrollWidth > width + 1;
  const height = Math.min(document.documentElement.scrollHeight, 6000);
  return JSON.stringify({ overflow, width, wide: overflow ? wide.slice(0, 4) : [], small: small.slice(0, 2), height });
})()
