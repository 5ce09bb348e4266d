const STEP = 20;  // cards that are added at a time
const $ = id => document.getElementById(id);
const form = document.forms[0];
const data = JSON.parse($('data').textContent);  // a problem an entry, see pack_problem() in report.py
for (const problem of data) problem.text = problem.text.toLowerCase();

let found = [];  // problems that pass the filters
let shown = 0;  // how many of them have a card

// Unpack a problem's card. innerHTML is safe: report.py has escaped the text.
async function fill(article, problem) {
  const bytes = Uint8Array.from(atob(problem.html), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  article.innerHTML = await new Response(stream).text();
  unfold(article);
}

// Open the responses with the verdict that is asked for, or all.
function unfold(parent) {
  for (const sample of parent.querySelectorAll('.sample'))
    sample.open = form.open.checked || sample.dataset.verdict === form.verdict.value;
}

function more() {
  for (const problem of found.slice(shown, shown + STEP))
    fill($('list').appendChild(document.createElement('article')), problem);
  shown += STEP;
  $('more').hidden = shown >= found.length;
}

function passes(problem) {
  const set = form.set.value;
  const verdict = form.verdict.value;
  return (!set || problem.set === set)
    && (!verdict || problem.verdicts.includes(verdict))
    && (!form.mixed.checked || problem.mixed)
    && problem.text.includes(form.text.value.toLowerCase());
}

function filter() {
  found = data.filter(passes);
  const parts = [`${found.length} of ${data.length} problems`];
  const verdicts = found.flatMap(problem => problem.verdicts);
  for (const option of form.verdict) {
    const count = verdicts.filter(verdict => verdict === option.value).length;
    if (count) parts.push(`${count} ${option.value}`);
  }
  $('count').value = parts.join(' · ');
  $('list').replaceChildren();
  shown = 0;
  more();
}

form.oninput = event => event.target === form.open ? unfold($('list')) : filter();
form.onsubmit = event => event.preventDefault();
$('more').onclick = more;
const moreIsNear = entries => entries.at(-1).isIntersecting && more();
new IntersectionObserver(moreIsNear, {rootMargin: '600px'}).observe($('more'));
filter();
