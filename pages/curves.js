const {charts, recorded} = JSON.parse(document.getElementById('data').textContent);  // see Chart in curves.py
const figures = [...document.querySelectorAll('figure')];
const stepsOf = charts.map(({lines}) => [...new Set(lines.flatMap(line => line.steps))].sort((a, b) => a - b));
const nearest = (steps, step) => steps.reduce((a, b) => Math.abs(b - step) < Math.abs(a - step) ? b : a);
const placeOf = figure => Number(figure.dataset.step ?? charts[figure.dataset.chart].last);

// Show a chart's values of the step nearest to a place.
function read(figure, place) {
  const {lines, first, last} = charts[figure.dataset.chart];
  const items = figure.querySelectorAll('.lines li b');
  const step = nearest(stepsOf[figure.dataset.chart], place);
  lines.forEach((line, i) => {
    const at = line.steps.indexOf(step);
    items[i].textContent = at < 0 ? '–' : Number(line.values[at].toPrecision(4));
  });
  figure.querySelector('small').textContent = `step ${step}`;
  figure.dataset.step = step;
  const cursor = figure.querySelector('.cursor');
  const x = 50 + 300 * (step - first) / Math.max(1, last - first);
  cursor.setAttribute('x1', x);
  cursor.setAttribute('x2', x);
  cursor.removeAttribute('visibility');
}

// Move all charts to a step, and show the way to the responses of the nearest recorded one.
function moveTo(step) {
  for (const figure of figures) read(figure, step);
  if (!recorded.length) return;
  const link = document.querySelector('#at a');
  link.href = pageOf(step);
  const opened = nearest(recorded, step);
  link.textContent = `Responses of step ${opened}${opened === step ? '' : ', the nearest that is recorded'}`;
  document.getElementById('at').hidden = false;
}

const pageOf = step => `rollouts.html#step=${step}`;  // which shows the nearest one that it has, and says so

for (const figure of figures) {
  const {first, last} = charts[figure.dataset.chart];
  const svg = figure.querySelector('svg');
  const placeUnder = event => {
    const box = svg.getBoundingClientRect();
    const x = 360 * (event.clientX - box.left) / box.width;
    return first + (last - first) * (x - 50) / 300;
  };
  svg.onpointermove = event => moveTo(nearest(stepsOf[figure.dataset.chart], placeUnder(event)));
  svg.onclick = event => {
    moveTo(nearest(stepsOf[figure.dataset.chart], placeUnder(event)));
    // a finger has no other way to point: it opens the link
    if (recorded.length && event.pointerType !== 'touch') location.href = pageOf(placeOf(figure));
  };
  svg.onkeydown = event => {
    if (event.key === 'Enter' && recorded.length) location.href = pageOf(placeOf(figure));
    const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!way) return;
    event.preventDefault();
    const steps = stepsOf[figure.dataset.chart];
    const at = steps.indexOf(nearest(steps, placeOf(figure)));
    moveTo(steps[Math.min(steps.length - 1, Math.max(0, at + way))]);
  };
}
