// Which tokens of one answer are not in another: a longest common subsequence of the two, as diff finds it.

/** For each token of `tokens` whether it is outside the longest common subsequence with `reference`. */
export function differing(reference, tokens) {
  let start = 0;
  while (start < reference.length && start < tokens.length && reference[start] === tokens[start]) start++;
  const a = reference.slice(start), b = tokens.slice(start);
  const longest = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      longest[i][j] = a[i] === b[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    }
  }
  const differs = new Array(tokens.length).fill(false);
  for (let i = 0, j = 0; j < b.length;) {
    if (i < a.length && a[i] === b[j]) { i++; j++; }
    else if (i < a.length && longest[i + 1][j] >= longest[i][j + 1]) i++;
    else differs[start + j++] = true;
  }
  return differs;
}
