const LONG = 3000;  // tokens of a response that are added at a time
const ROWS = 12;  // of the table of tokens, at a time
const ANSWERS = 5;  // of a problem, the most frequent ones
const CAUSES = 6;  // of a step, likewise
const EXAMPLES = 3;  // of what right responses have at a place, likewise
const END = null;  // where a right response has no further token
const AROUND = 4;  // tokens that are shown on either side of a place
const PARTS = 4;  // into which lengths are divided
const $ = id => document.getElementById(id);
const form = document.forms[0];
const data = JSON.parse($('data').textContent);  // see write_rollouts_page() in rollouts.py

// What a token can be coloured by, and what that means. Signed measures have two hues, around their centre.
const REWARD = `${data.dense} reward`;
const SCORE = data.dense === 'flow' ? 'deviation' : `${data.dense} score`;
const SCORED = data.dense === 'flow'
  ? "the flow's error on the hidden state at the token, once it is read: the larger, the less like an expert's"
  : `what ${data.dense} says of the token, before that is made a reward`;
const DENSE = [
  {name: REWARD, key: 'dense_reward', signed: true, centre: 0,
    means: `what ${data.dense === 'flow' ? 'the flow' : data.dense} gives each token, beside the reward of the answer; below 0 it is a penalty`},
  {name: SCORE, key: 'mean_score', means: SCORED + (data.taps.length > 1 ? '; a mean over layers, the taps' : '')},
  ...data.taps.map((layer, i) => ({name: `tap ${i + 1} (layer ${layer})`, tap: i,
    means: `${SCORED}; from the outputs of layer ${layer} alone`})),
];
const MEASURES = [
  ...data.dense ? DENSE : [],
  {name: 'log-prob', key: 'logp', falling: true, means: 'logarithm of the probability that the policy gave the token'},
  {name: 'entropy', key: 'entropy', means: 'how open the choice of the token was: 0 where only one could follow'},
  {name: 'advantage', key: 'advantage', signed: true, centre: 0,
    means: 'above 0 the update makes the token more likely, below 0 less'},
  {name: 'advantage − outcome', key: 'beyond', signed: true, centre: 0, from: 'outcome',
    means: 'what the dense reward adds to the advantage of a right or wrong answer'},
  {name: 'ratio', key: 'ratio', signed: true, centre: 1,
    means: "the trainer's probability of the token over that of the engine that sampled it"},
].filter(of => !of.key || of.key === 'mean_score' || data.known.includes(of.from ?? of.key));

let groups = [];  // of the step that is shown: a problem with its responses each
let earlier = null;  // the step before it on this page: its number and groups
let hasSolutions = false;  // whether the policy writes as the data's solutions do, in this step
let measure = MEASURES[0];
let marked = null;  // the text of the token that the table has picked
let rows = ROWS;

// ---- Reading
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return JSON.parse(await new Response(stream).text());
}

const unpackStep = step => Promise.all((step?.groups ?? []).map(unpack));

function mean(numbers) {
  const known = numbers.filter(x => x !== null && x !== undefined);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}

// Add to a response what is not in the file: the mean over taps of its scores, whether it is the solution, what its
// advantage has beyond that of the outcome, where it leaves what is right, and what is right there.
function prepare(response, group) {
  response.mean_score = response.tokens.map((_, k) => mean(response.dense_score.map(d => d[k])));
  response.isSolution = hasSolutions && isSolution(response, group);
  response.beyond = response.advantage.map(x => x === null ? null : x - response.outcome);
  const {place, instead, right} = response.correct ? {} : leaving(response, group);
  response.leaves = place < response.tokens.length ? place : null;
  response.instead = instead;
  response.right = right;
}

const whatIsRight = () => hasSolutions ? 'the solution' : 'the right ones';
const nRight = group => group.responses.filter(r => r.correct).length;

// The place of the first token at which a response leaves what is right; what is right there, by frequency; and how
// that goes on. Solutions of the data are compared with if the policy writes as they do, since a right answer may
// come from wrong steps; else the right responses to the problem.
function leaving(response, group) {
  if (hasSolutions) return group.solution ? leavingSolution(response, group.solution) : {};
  const right = group.responses.filter(r => r.correct);
  return right.length ? leavingResponses(response, right) : {};
}

function leavingSolution(response, solution) {
  const place = lengthWithin(response.tokens, solution);
  const from = response.tokens.slice(0, place).join('').length;
  const [before, here, after] = around(response.tokens, place);
  const to = from + (here === END ? 0 : here.length);  // it has no tokens: as many characters stand for them
  const text = solution.slice(from, to) || END;
  return {place, instead: [[text, 1]], right: [before, text, solution.slice(to, to + after.length)]};
}

// Of several right responses those that have the same tokens the longest; the place may be the end.
function leavingResponses(response, right) {
  const common = right.map(r => commonLength(response.tokens, r.tokens));
  const place = Math.max(...common);
  const nearest = right.filter((_, i) => common[i] === place);
  const instead = tally(nearest.map(r => r.tokens[place] ?? END));
  const {tokens} = nearest.find(r => (r.tokens[place] ?? END) === instead[0][0]);
  return {place, instead, right: around(tokens, place)};
}

// The token at a place, and the texts of those before and after it.
function around(tokens, place) {
  const before = tokens.slice(Math.max(0, place - AROUND), place).join('');
  return [before, tokens[place] ?? END, tokens.slice(place + 1, place + 1 + AROUND).join('')];
}

// Each different text with how often it is there, the most frequent first.
function tally(texts) {
  const counts = new Map();
  for (const text of texts) counts.set(text, (counts.get(text) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]);
}

// Whether some right response of the step is the solution of its problem, word for word.
function writesSolutions() {
  return groups.some(group => group.responses.some(r => r.correct && isSolution(r, group)));
}

const isSolution = (response, {solution}) => Boolean(solution) && response.tokens.join('').startsWith(solution);

function commonLength(a, b) {
  let n = 0;
  while (n < a.length && n < b.length && a[n] === b[n]) n += 1;
  return n;
}

// How many tokens stand at the beginning of a text.
function lengthWithin(tokens, text) {
  let n = 0;
  let read = '';
  while (n < tokens.length && text.startsWith(read + tokens[n])) {
    read += tokens[n];
    n += 1;
  }
  return n;
}

const values = (response, of) => of.tap === undefined ? response[of.key] : response.dense_score[of.tap];
const responses = () => groups.flatMap(group => group.responses);

// Six digits are what the file has; fewer are shown in tables.
function show(x, digits = 6) {
  if (x === null || x === undefined) return '–';
  const text = Number(x.toPrecision(digits)).toString();
  return text.replace('-', '−');
}

// ---- Building
function element(tag, content = '', classes = '') {
  const made = document.createElement(tag);
  if (Array.isArray(content)) made.append(...content);
  else made.textContent = content;
  made.className = classes;
  return made;
}

function row(cells, tag = 'td') {
  const [head, ...rest] = cells;
  const first = element('th', head);
  first.scope = tag === 'th' ? 'col' : 'row';
  return element('tr', [first, ...rest.map(cell => element(tag, cell))]);
}

// A token as it stands in a table: what would not be seen has a sign, or its number in Unicode.
const codePoint = c => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}`;
function visible(text) {
  if (text === END) return 'the end';
  if (text === '') return '◌';
  return inLine(text).replace(/^ +| +$/g, s => '␣'.repeat(s.length));
}

// A text on one line, likewise.
function inLine(text) {
  return text.replace(/\n/g, '↵').replace(/\t/g, '⇥').replace(/[\p{Cc}\p{Cf}\p{Cs}]/gu, codePoint);
}

// A token as it stands in a response, between its neighbours.
function tokenElement(text) {
  const hasShape = /[^\p{Cc}\p{Cf}\p{Cs}]|\n|\t/u.test(text);
  const made = element('span', text.replace(/\n/g, '↵\n').replace(/\t/g, '⇥\t'), hasShape ? 't' : 't hidden');
  const [spaces] = text.match(/^ */);
  if (spaces) made.dataset.spaces = '·'.repeat(spaces.length);  // drawn over them by the style
  return made;
}

// ---- Colours
// Return the bounds of a measure in this step; a fiftieth of the values may lie beyond a bound.
function bounds(of) {
  const sorted = responses().flatMap(r => values(r, of)).filter(x => x !== null).sort((a, b) => a - b);
  if (!sorted.length) return [0, 1];
  const at = share => sorted[Math.round(share * (sorted.length - 1))];
  if (!of.signed) return [at(.02), at(.98)];
  const reach = Math.max(Math.abs(at(.02) - of.centre), Math.abs(at(.98) - of.centre),
    of.key === 'dense_reward' ? Math.max(...sorted.map(Math.abs)) : 0);
  return [of.centre - reach, of.centre + reach];
}

function strength(x, of, [low, high]) {
  if (x === null || high === low) return ['', 0];
  const share = Math.min(1, Math.max(0, (x - low) / (high - low)));
  if (!of.signed) return ['only', of.falling ? 1 - share : share];
  return share < .5 ? ['low', 1 - 2 * share] : ['high', 2 * share - 1];
}

function paint() {
  const range = bounds(measure);
  for (const text of document.querySelectorAll('.text[data-sample]')) {
    const numbers = values(text.response, measure);
    for (const token of text.querySelectorAll('.t')) {
      const [hue, share] = strength(numbers[token.place], measure, range);
      token.classList.remove('low', 'high', 'only');
      if (hue) token.classList.add(hue);
      token.style.setProperty('--s', share.toFixed(3));
    }
  }
  const ends = measure.falling ? [range[1], range[0]] : range;
  $('low').textContent = show(ends[0], 3);
  $('high').textContent = show(ends[1], 3);
  $('ramp').className = measure.signed ? 'signed' : 'only';
  $('means').textContent = `${measure.name}: ${measure.means}`;
}

// ---- Responses
function tokens(response, from) {
  return response.tokens.slice(from, from + LONG).map((text, i) => {
    const token = tokenElement(text);
    token.place = from + i;
    if (token.place === response.leaves) {
      token.classList.add('leaves');
      token.title = `Here it leaves ${whatIsRight()}: there ${said(response.instead)} is written`;
    }
    token.tabIndex = from + i ? -1 : 0;
    return token;
  });
}

// Texts by frequency, the first ones of them.
function said(counted) {
  const all = counted.reduce((sum, [, n]) => sum + n, 0);
  const named = counted.slice(0, EXAMPLES).map(([text, n]) => visible(text) + (n < all ? ` (${n} of ${all})` : ''));
  return named.join(', ') + (counted.length > EXAMPLES ? ', …' : '');
}

function card(response) {
  const badge = element('b', response.verdict, `badge ${response.verdict.replace(/\W/g, '-')}`);
  const parts = Object.entries(response.parts).map(([name, value]) => `${name} ${show(value, 4)}`);
  const facts = [`${data.dense ? 'outcome reward' : 'reward'} ${show(response.reward, 4)}`, `${response.tokens.length} tokens`];
  if (parts.length > 1) facts.push(parts.join(', '));
  if (response.finish_reason === 'length') facts.push('ran out of room');
  const advantage = mean(response.advantage);
  const ofOutcome = response.outcome === null ? '' : ` (outcome ${show(response.outcome, 3)})`;
  if (advantage !== null) facts.push(`advantage ${show(advantage, 3)}${ofOutcome}`);
  if (data.dense) {
    const sum = sumOf(response);
    facts.push(`${REWARD} ${show(sum, 3)}, ${show(mean(response.dense_reward), 2)} a token`);
  }
  if (hasSolutions && response.correct && !response.isSolution) facts.push('a right answer, but not the steps of the solution');
  if (response.leaves !== null) {
    facts.push(`leaves ${whatIsRight()} at token ${response.leaves + 1}: `
      + `${visible(response.tokens[response.leaves])} for ${said(response.instead)}`);
  }
  const head = element('h2', [
    element('span', `sample ${response.sample}`), badge,
    element('span', response.extracted ?? 'no answer'), element('small', facts.join(' · ')),
  ]);
  const text = element('div', tokens(response, 0), 'text');
  text.response = response;
  text.dataset.sample = response.sample;
  text.dir = 'auto';
  text.setAttribute('role', 'group');
  text.setAttribute('aria-label', `Tokens of sample ${response.sample}; arrow keys move`);
  const made = element('article', [head, text]);
  if (response.tokens.length > LONG) {
    const more = element('button', `Show more of ${response.tokens.length} tokens`);
    more.onclick = () => {
      text.append(...tokens(response, text.children.length));
      if (text.children.length === response.tokens.length) more.remove();
      paint();
      mark();
    };
    made.append(more);
  }
  if (response.text) made.append(element('small', response.text));
  return made;
}

function problem(group) {
  const right = [group.answer].flat().join(' or ');
  const parts = [element('h2', `Problem ${group.problem}, right answer ${right}`)];
  parts.push(element('div', group.question, 'text block'), element('p', answers(group)));
  if (group.images.length) parts.push(element('p', `Images: ${group.images.join(', ')}`, 'images'));
  if (group.solution) {
    parts.push(folded('Solution', group.solution));
    parts.at(-1).open = hasSolutions || !nRight(group);  // it is compared with, or there is nothing else
  }
  $('problem').replaceChildren(...parts, folded('Prompt', group.prompt));
}

const folded = (title, text) =>
  element('details', [element('summary', title), element('code', text, 'block')]);

// Which answers the responses to a problem give, how often, and whether the outcome tells them apart.
function answers(group) {
  const counts = tally(group.responses.map(r => r.extracted || 'none'));
  const others = counts.length > ANSWERS ? `, ${counts.length - ANSWERS} others` : '';
  const given = counts.slice(0, ANSWERS).map(([answer, n]) => `${visible(answer)} (${n} of ${group.responses.length})`);
  const isEqual = new Set(group.responses.map(r => r.reward)).size === 1;
  const teaches = isEqual && (data.dense || data.known.includes('outcome'))  // of a run of ours
    ? ' All rewards are equal, so that the outcome gives no advantage here.' : '';
  const atLeaving = rewardsAtLeaving(group.responses);
  const sees = data.dense && atLeaving.length
    ? ` The ${REWARD} penalises ${nPenalised(atLeaving)} of ${atLeaving.length} framed tokens.` : '';
  return `Answers given: ${given.join(', ')}${others}.${teaches}${sees}`;
}

// The dense rewards at which wrong responses leave what is right, and how many of rewards are penalties.
const rewardsAtLeaving = those => those.filter(r => r.leaves !== null).map(r => r.dense_reward[r.leaves]);
const nPenalised = rewards => rewards.filter(x => x < 0).length;

function passes(response) {
  const verdict = form.verdict.value;
  return (!verdict || (verdict === 'right') === response.correct)
    && (marked === null || response.tokens.includes(marked));
}

// ---- Causes
// Where the wrong responses of the step leave what is right: what they write, for what, and how often.
function findCauses() {
  const causes = new Map();
  for (const group of groups)
    for (const response of group.responses) {
      const place = response.leaves;
      if (place === null) continue;
      const written = response.tokens[place];
      const [[instead]] = response.instead;
      const key = JSON.stringify([written, instead]);
      if (!causes.has(key)) causes.set(key, {responses: [], groups: []});
      const cause = causes.get(key);
      cause.responses.push(response);
      cause.groups.push(group);
    }
  return [...causes.values()].sort((a, b) => b.responses.length - a.responses.length);
}

function causeTable() {
  const causes = findCauses();
  const wrong = responses().filter(r => !r.correct);
  const atLeaving = rewardsAtLeaving(wrong);
  const parts = [element('h2', `Where wrong responses leave ${whatIsRight()}, this step`)];
  const compared = hasSolutions ? 'the solution of their problem' : 'all right responses to their problem';
  const sees = data.dense ? ` The last column counts the responses in which the ${REWARD} is below 0 there.` : '';
  const differing = atLeaving.length
    ? `${atLeaving.length} of these leave ${compared}. Their first token that differs is framed, and counted here; it need not be `
      + `the mistake itself.${sees}`
    : 'There is nothing that they could be compared with.';
  parts.push(element('p', `Problems: ${groups.length}. Responses: ${responses().length}, not right: ${wrong.length}. ${differing}`));
  const has = hasSolutions ? 'the solution has' : 'right ones have';
  const heads = ['wrong ones have', has, 'responses', 'problems', ...data.dense ? ['penalised'] : []];
  const table = element('table', [row(heads, 'th')]);
  for (const cause of causes.slice(0, CAUSES)) table.append(causeRow(cause));
  if (causes.length) parts.push(element('div', [table], 'wide'));
  if (causes.length > CAUSES) parts.push(element('small', `Not shown: ${causes.length - CAUSES} other differences, none of them more frequent.`));
  $('causes').replaceChildren(...parts);
}

// What wrong responses write, as one of them has it after the most frequent tokens, and what is right there.
function causeRow({responses, groups: problems}) {
  const before = responses.map(r => around(r.tokens, r.leaves)[0]);
  const [[most, n]] = tally(before);
  const first = before.indexOf(most);
  const {tokens, leaves, right} = responses[first];
  const button = element('button', marking(around(tokens, leaves)));
  button.type = 'button';
  button.title = 'Show this response';
  button.onclick = () => showPlace(responses[first], problems[first]);
  const cells = [responses.length, new Set(problems).size];
  if (data.dense) cells.push(nPenalised(rewardsAtLeaving(responses)));
  const made = row(['', '', ...cells]);
  made.children[0].append(button);
  if (n < responses.length) {
    const which = `${visible(tokens[leaves])} instead of ${visible(right[1])}`;
    made.children[0].append(element('small', `${which}: ${responses.length} responses, ${n} of them after ${visible(most)}`));
  }
  made.children[1].append(...marking(right));
  return made;
}

// The token at a place, marked among those around it.
function marking([before, here, after]) {
  const gap = here === END && before ? ' ' : '';
  return [inLine(before) + gap, element('mark', visible(here)), inLine(after)];
}

// Show the problem of a response, and the values of the token at which it leaves what is right.
function showPlace(response, group) {
  form.group.selectedIndex = groups.indexOf(group);
  form.verdict.value = '';
  marked = null;
  view();
  const text = [...document.querySelectorAll('.text[data-sample]')].find(t => t.response === response);
  text.children[response.leaves]?.focus();
}

// ---- Tables
function outcomes() {
  const table = [row(['', 'right', 'not right'], 'th')];
  const sides = [true, false].map(correct => responses().filter(r => r.correct === correct));
  const line = (name, figure) => table.push(row([name, ...sides.map(side => show(figure(side), 4))]));
  line('responses', side => side.length);
  if (hasSolutions) line('as in the solution', side => side.filter(r => r.isSolution).length);
  line('tokens a response', side => mean(side.map(r => r.dense_reward.filter(x => x !== null).length)));
  const of = key => side => mean(side.flatMap(r => r[key]));
  if (data.dense) {
    line(SCORE, of('mean_score'));
    line(`${REWARD} a response`, side => mean(side.map(sumOf)));
    line(`${REWARD} a token`, of('dense_reward'));
  }
  line('entropy', of('entropy'));
  line('log-prob', of('logp'));
  $('outcomes').replaceChildren(...table);
  $('verdict').textContent = data.dense ? verdict() : '';
}

const sumOf = response => response.dense_reward.reduce((a, b) => a + b, 0);
const meanOf = response => mean(response.dense_reward.filter(x => x !== null));

// Of how many problems the right responses have more of a figure than the wrong ones, in the mean.
const nPreferred = (those, figure) => those.filter(({responses}) => {
  const [right, wrong] = [true, false].map(correct => responses.filter(r => r.correct === correct));
  return mean(right.map(figure)) > mean(wrong.map(figure));
}).length;

// Say whether the dense reward prefers right responses to wrong ones of the same problem, as others may be
// easier or shorter, and whether it sees where wrong ones go wrong.
function verdict() {
  let said = '';
  const both = groups.filter(group => 0 < nRight(group) && nRight(group) < group.responses.length);
  if (both.length) {
    said += `Within a problem: the right responses get more ${REWARD} than the wrong ones in ${nPreferred(both, sumOf)} of ${both.length} `
      + `problems that have both, summed over tokens, and in ${nPreferred(both, meanOf)} as a mean of tokens; half would be chance. `;
  }
  const wrong = responses().filter(r => !r.correct);
  const atLeaving = rewardsAtLeaving(wrong);
  const ofAll = correct => responses().filter(r => r.correct === correct).flatMap(r => r.dense_reward).filter(x => x !== null);
  const share = rewards => percent(rewards.length ? nPenalised(rewards) / rewards.length : null);
  if (atLeaving.length) {
    said += `It penalises ${nPenalised(atLeaving)} of ${atLeaving.length} framed tokens, at which wrong responses leave `
      + `${whatIsRight()}: ${share(atLeaving)}. Of all tokens of wrong responses it penalises ${share(ofAll(false))}, `
      + `of right ones ${share(ofAll(true))}. `;
  }
  const [most] = tally(responses().flatMap(r => r.tokens.filter((_, k) => r.dense_reward[k] < 0)));
  if (most) {
    const all = nPenalised([...ofAll(true), ...ofAll(false)]);
    said += `Of its penalties ${percent(most[1] / all)} are on ${visible(most[0])}, the most.`;
  }
  return said;
}

// How many responses are right by the length of the problem, and by their own, in parts of about equal size; of
// problems also how many were in the step before, as another step may have harder ones.
function lengths() {
  const head = ['', 'right', 'not right', ...earlier ? [`right in step ${earlier.step}`] : []];
  const table = [row(head, 'th')];
  const ofProblem = group => group.question.length;
  let expected = 0;
  for (const {name, own, isIn} of parts(ofProblem)) {
    const before = earlier ? responsesIn(earlier.groups, group => isIn(ofProblem(group))) : [];
    const share = mean(before.map(r => Number(r.correct)));
    table.push(row([`problem of ${name} characters`, ...counts(own), ...earlier ? [percent(share)] : []]));
    expected = share === null || expected === null ? null : expected + share * own.length;
  }
  for (const {name, own} of parts((_, response) => response.tokens.length))
    table.push(row([`response of ${name} tokens`, ...counts(own), ...earlier ? [''] : []]));
  $('lengths').replaceChildren(...table);
  const rightBefore = earlier && mean(earlier.groups.flatMap(g => g.responses).map(r => Number(r.correct)));
  $('mix').textContent = earlier && expected !== null
    ? `Right in step ${earlier.step}: ${percent(rightBefore)}, and here ${percent(mean(responses().map(r => Number(r.correct))))}. `
      + `With its shares for each length of a problem, this step would have ${percent(expected / responses().length)}: `
      + 'so far the lengths of the problems explain the change. The rest is the policy, or harder problems of equal length.'
    : '';
}

// The responses of the step by a length, in PARTS of about equal size, fewer where lengths are equal.
function parts(lengthOf) {
  const all = groups.flatMap(group => group.responses.map(response => ({response, n: lengthOf(group, response)})));
  const sorted = all.sort((a, b) => a.n - b.n);
  const ends = Array.from({length: PARTS}, (_, i) => sorted[Math.ceil((i + 1) * sorted.length / PARTS) - 1].n);
  const made = [];
  let from = -Infinity;
  for (const to of new Set(ends)) {
    const least = from;
    const isIn = n => least < n && n <= to;
    const own = sorted.filter(({n}) => isIn(n));
    made.push({name: own[0].n < to ? `${own[0].n} to ${to}` : `${to}`, own: own.map(one => one.response), isIn});
    from = to;
  }
  return made;
}

const responsesIn = (some, isMeant) => some.filter(isMeant).flatMap(group => group.responses);
const counts = some => [true, false].map(correct => some.filter(r => r.correct === correct).length);
const percent = share => share === null ? '–' : `${(100 * share).toFixed(0)} %`;

// Count the tokens of the step that the policy sampled by their text.
function count() {
  const counts = new Map();
  for (const response of responses())
    response.tokens.forEach((text, k) => {
      if (response.dense_reward[k] === null) return;  // the policy did not sample it
      const entry = counts.get(text) ?? {text, n: 0, sum: 0, rewarded: 0, scores: []};
      entry.n += 1;
      entry.sum += response.dense_reward[k];
      entry.rewarded += response.dense_reward[k] !== 0;
      entry.scores.push(response.mean_score[k]);
      counts.set(text, entry);
    });
  const entries = [...counts.values()];
  for (const entry of entries) entry.score = mean(entry.scores);
  const sign = document.querySelector('[name=order]:checked').value === 'penalised' ? 1 : -1;
  return entries.sort((a, b) => sign * (a.sum - b.sum) || sign * (b.score - a.score));
}

function tokenTable() {
  const entries = count();
  const table = [row(['token', 'count', 'with a reward', data.dense ? REWARD : 'reward', data.dense ? SCORE : 'score'], 'th')];
  for (const entry of entries.slice(0, rows)) {
    const button = element('button', visible(entry.text));
    button.type = 'button';
    button.title = JSON.stringify(entry.text);
    button.setAttribute('aria-pressed', entry.text === marked);
    button.onclick = () => choose(entry.text === marked ? null : entry.text);
    const cells = [entry.n, percent(entry.rewarded / entry.n), show(entry.sum / entry.n, 3), show(entry.score, 4)];
    const made = row(['', ...cells]);
    made.firstChild.append(button);
    table.push(made);
  }
  $('tokens').replaceChildren(...table);
  $('more').hidden = rows >= entries.length;
}

function choose(text) {
  marked = text;
  view();
  const pressed = $('tokens').querySelector('[aria-pressed=true]');
  if (pressed) pressed.focus();
}

function mark() {
  $('list').classList.toggle('marking', marked !== null);
  for (const text of document.querySelectorAll('.text[data-sample]'))
    for (const token of text.querySelectorAll('.t'))
      token.classList.toggle('marked', text.response.tokens[token.place] === marked);
  $('unmark').hidden = marked === null;
  if (marked !== null) $('unmark').textContent = `✕ ${visible(marked)}`;
}

// ---- The values of one token
function facts(token) {
  const response = token.parentElement.response;
  const k = token.place;
  const entries = [
    ['token', visible(response.tokens[k])],
    ['id', response.token_ids[k]],
    ['place', `${k + 1} of ${response.tokens.length}, sample ${response.sample}`],
    ...MEASURES.map(of => [of.name, show(values(response, of)[k])]),
  ];
  const list = element('dl', entries.map(([name, value]) => {
    const term = element('dt', name);
    return element('div', [term, element('dd', value, name === 'token' ? 'name' : '')]);
  }));
  $('facts').replaceChildren(list);
  $('facts').open = true;
}

function move(token, key) {
  const texts = [...document.querySelectorAll('.text[data-sample]')];
  const own = token.parentElement;
  if (key === 'ArrowRight') return token.nextElementSibling;
  if (key === 'ArrowLeft') return token.previousElementSibling;
  if (key === 'Home') return own.firstElementChild;
  if (key === 'End') return own.lastElementChild;
  const other = texts[texts.indexOf(own) + (key === 'ArrowDown' ? 1 : -1)];
  return other && other.children[Math.min(token.place, other.children.length - 1)];
}

// ---- The view
function view() {
  const group = groups[form.group.selectedIndex];
  problem(group);
  const shown = group.responses.filter(passes);
  $('list').replaceChildren(...shown.map(card));
  $('count').value = `${shown.length} of ${group.responses.length} responses shown · ${nRight(group)} right`;
  tokenTable();
  paint();
  mark();
  $('facts').open = false;
}

async function step() {
  const chosen = data.steps[form.step.value];
  const before = data.steps[form.step.value - 1];
  const [unpacked, unpackedBefore] = await Promise.all([chosen, before].map(unpackStep));
  if (chosen !== data.steps[form.step.value]) return;  // the reader has moved on
  groups = unpacked;
  earlier = before ? {step: before.step, groups: unpackedBefore} : null;
  hasSolutions = writesSolutions();
  $('reference').textContent = whatIsRight();
  for (const group of groups) for (const response of group.responses) prepare(response, group);
  form.group.replaceChildren(...groups.map(group =>
    element('option', `${group.problem} (${nRight(group)} of ${group.responses.length} right)`)));
  form.group.selectedIndex = problemToShow();
  const reward = chosen.reward === null ? '' : ` · reward ${chosen.reward.toFixed(2)}`;
  const nth = `${Number(form.step.value) + 1} of ${data.steps.length} on this page`;
  $('now').value = `${chosen.step}${reward} · ${nth}`;
  history.replaceState(null, '', `#step=${chosen.step}`);
  rows = ROWS;
  causeTable();
  outcomes();
  lengths();
  view();
}

// The problem that a step begins with: one whose responses leave what is right in the way that is most frequent in
// the step, if any does; among these one with right and wrong responses, the most of that way, the most wrong ones.
function problemToShow() {
  const [{responses: frequent} = {responses: []}] = findCauses();
  const worth = ({responses}) => {
    const n = responses.filter(r => frequent.includes(r)).length;
    const wrong = responses.filter(r => !r.correct).length;
    return [n > 0, 0 < wrong && wrong < responses.length, n, wrong];
  };
  const worths = groups.map(worth);
  const isMore = (a, b) => { const k = a.findIndex((x, i) => x !== b[i]); return k >= 0 && a[k] > b[k]; };
  return worths.reduce((best, one, i) => isMore(one, worths[best]) ? i : best, 0);
}

// Show the step of the address, #step=N, or the nearest one that is here, and say so; without an address the first
// at which the reward fell.
function stepOfAddress() {
  const fall = data.falls.find(fall => data.steps.some(({step}) => step === fall));
  const [, wanted = fall] = location.hash.match(/^#step=(\d+)$/) ?? [];
  $('nearest').hidden = true;
  if (wanted === undefined) return;
  const away = data.steps.map(({step}) => Math.abs(step - wanted));
  form.step.value = away.indexOf(Math.min(...away));
  const {step} = data.steps[form.step.value];
  $('nearest').hidden = step === Number(wanted);
  $('nearest').textContent = `Step ${wanted} is not on this page. This is step ${step}, the nearest that is.`;
}

for (const [i, of] of MEASURES.entries()) {
  const input = element('input');
  Object.assign(input, {type: 'radio', name: 'colour', value: of.name, checked: i === 0});
  $('colours').append(element('label', [input, ` ${of.name}`]));
}
form.oninput = event => {
  if (event.target.name === 'colour') {
    measure = MEASURES.find(of => of.name === form.colour.value);
    paint();
  } else if (event.target.name === 'step') {
    $('nearest').hidden = true;
    step();
  } else view();
};
form.onsubmit = event => event.preventDefault();
$('counts').oninput = tokenTable;
$('more').onclick = () => { rows += ROWS; tokenTable(); };
$('unmark').onclick = () => choose(null);
document.onclick = event => { if (!isToken(event.target)) $('facts').open = false; };
const isToken = target => target.classList?.contains('t');
document.onpointerover = event => isToken(event.target) && facts(event.target);
document.addEventListener('focusin', event => isToken(event.target) && facts(event.target));
document.addEventListener('keydown', event => {
  if (event.key === 'Escape') $('facts').open = false;
  if (!isToken(event.target) || !/^(Arrow|Home|End)/.test(event.key)) return;
  const next = move(event.target, event.key);
  event.preventDefault();
  if (next) next.focus();
});
if (data.steps.length === 1) form.step.disabled = true;
window.onhashchange = () => { stepOfAddress(); step(); };
stepOfAddress();
step();
