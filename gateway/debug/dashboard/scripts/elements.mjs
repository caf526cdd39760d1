// Finds, creates and updates elements. All data becomes text, never markup.

/**
 * The element with this id. Throws if it is missing or of another class.
 *
 * @template {Element} [Kind=HTMLElement]
 * @param {string} id
 * @param {new () => Kind} [kind]
 * @returns {Kind}
 */
export function byId(id, kind) {
  return checked(document.getElementById(id), `#${id}`, kind);
}

/**
 * The first element inside `parent` that matches `selector`. Throws if there is none.
 *
 * @template {Element} [Kind=HTMLElement]
 * @param {Element} parent
 * @param {string} selector
 * @param {new () => Kind} [kind]
 * @returns {Kind}
 */
export function find(parent, selector, kind) {
  return checked(parent.querySelector(selector), selector, kind);
}

/**
 * @template {Element} Kind
 * @param {Element | null} node
 * @param {string} name
 * @param {new () => Kind} [kind]
 * @returns {Kind}
 */
function checked(node, name, kind) {
  const expected = /** @type {new () => Kind} */ (kind ?? HTMLElement);
  if (node instanceof expected) return node;
  throw new Error(`${name} is not an ${expected.name}`);
}

/**
 * Create an element.
 *
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Partial<HTMLElementTagNameMap[Tag]>} [properties]
 * @param {...(Node | string)} children
 */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  Object.assign(node, properties);
  node.append(...children);
  return node;
}

/**
 * Set an element's text. Unchanged text is left alone, so that a selection in it survives.
 *
 * @param {Node} node
 * @param {string} text
 */
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * @param {HTMLElement} node
 * @param {boolean} visible
 */
export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

/**
 * Show a problem, or hide the element if there is none.
 *
 * @param {HTMLElement} node
 * @param {string | undefined} problem
 */
export function showProblem(node, problem = "") {
  write(node, problem);
  show(node, problem !== "");
}

/**
 * Make the children of `parent` match `items`, in the same order. A child whose item is still
 * there is updated rather than replaced, so that it keeps the focus.
 *
 * @template Item
 * @param {Element} parent
 * @param {Item[]} items
 * @param {(item: Item) => string} keyOf identifies an item; equal keys are matched in order
 * @param {(item: Item) => HTMLElement} create
 * @param {(row: HTMLElement, item: Item) => void} [update] called for every row, including new ones
 */
export function reconcile(parent, items, keyOf, create, update = () => {}) {
  const old = new Map(rowsOf(parent).map((row) => [row.dataset.key, row]));
  const counts = /** @type {Map<string, number>} */ (new Map());
  const rows = items.map((item) => {
    const name = keyOf(item);
    const count = counts.get(name) ?? 0;
    counts.set(name, count + 1);
    const key = `${name} ${count}`;
    const row = old.get(key) ?? create(item);
    old.delete(key);
    row.dataset.key = key;
    update(row, item);
    return row;
  });
  for (const row of old.values()) row.remove();
  rows.forEach((row, place) => {
    const current = parent.children[place] ?? null;
    if (current !== row) parent.insertBefore(row, current);
  });
}

/**
 * The children that `reconcile` created.
 *
 * @param {Element} parent
 */
export function rowsOf(parent) {
  return /** @type {HTMLElement[]} */ ([...parent.children]);
}
