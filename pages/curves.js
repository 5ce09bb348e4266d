const data = JSON.parse(document.getElementById('data').textContent);  // see Chart in curves.py

// Show the values of the step nearest to a place, or of the last one.
function read(figure, step) {
  const {lines, first, last} = data[figure.dataset.chart];
  const items = figure.querySelectorAll('.lines li b');
  const steps = [...new Set(lines.flatMap(line => line.steps))];
  const nearest = steps.reduce((a, b) => Math.abs(b - step) < Math.abs(a - step) ? b : a);
  lines.forEach((line, i) => {
    const at = line.steps.indexOf(nearest);
    items[i].textContent = at < 0 ? '–' : Number(line.values[at].toPrecision(4));
  });
  figure.querySelector('small').textContent = `step ${nearest}`;
  figure.dataset.step = nearest;
  const cursor = figure.querySelector('.cursor');
  const x = 46 + 304 * (nearest - first) / Math.max(1, last - first);
  cursor.setAttribute('x1', x);
  cursor.setAttribute('x2', x);
  cursor.removeAttribute('visibility');
}

for (const figure of document.querySelectorAll('figure')) {
  const {lines, first, last} = data[figure.dataset.chart];
  const svg = figure.querySelector('svg');
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect();
    const x = 360 * (event.clientX - box.left) / box.width;
    read(figure, first + (last - first) * (x - 46) / 304);
  };
  svg.onkeydown = event => {
    const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!way) return;
    event.preventDefault();
    const steps = [...new Set(lines.flatMap(line => line.steps))].sort((a, b) => a - b);
    const at = steps.indexOf(Number(figure.dataset.step ?? last));
    read(figure, steps[Math.min(steps.length - 1, Math.max(0, at + way))]);
  };
}
