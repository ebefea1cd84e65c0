// Sets the theme before the page is painted. The choice is the only thing that the console stores.
'use strict';

(() => {
  const NAME = 'envelog-theme';
  const THEMES = ['auto', 'light', 'dark'];

  function chosen() {
    try {
      const theme = localStorage.getItem(NAME);
      return THEMES.includes(theme) ? theme : 'auto';
    } catch {
      return 'auto';
    }
  }

  function apply(theme) {
    document.documentElement.dataset.theme = theme;
  }

  apply(chosen());
  document.addEventListener('DOMContentLoaded', () => {
    const button = document.getElementById('theme');
    const show = () => {
      button.textContent = `Theme: ${document.documentElement.dataset.theme}`;
    };
    button.addEventListener('click', () => {
      const now = document.documentElement.dataset.theme;
      const theme = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
      apply(theme);
      try {
        localStorage.setItem(NAME, theme);
      } catch {
        // Without storage, the choice lasts as long as the page.
      }
      show();
    });
    show();
  });
})();
