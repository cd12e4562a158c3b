
'use strict';
document.documentElement.classList.add('js');
for (const pair of document.querySelectorAll('.pair')) {
  const stage = pair.querySelector('.stage');
  const input = pair.querySelector('input');
  const show = () => {
    stage.style.setProperty('--at', `${input.value}%`);
    input.setAttribute('aria-valuetext', `before up to ${input.value}% of the width, then after`);
  };
  const follow = (event) => {
    const box = stage.getBoundingClientRect();
    input.value = (100 * (event.clientX - box.left)) / box.width;
    show();
  };
  input.addEventListener('input', show);
  stage.addEventListener('pointerdown', (event) => {
    event.preventDefault();
    stage.setPointerCapture(event.pointerId);
    follow(event);
  });
  stage.addEventListener('pointermove', (event) => {
    if (stage.hasPointerCapture(event.pointerId)) follow(event);
  });
  show();
}
const folded = [...document.querySelectorAll('details')];
let opened = [];
addEventListener('beforeprint', () => {
  opened = folded.filter((one) => !one.open);
  for (const one of opened) one.open = true;
});
addEventListener('afterprint', () => {
  for (const one of opened) one.open = false;
});
