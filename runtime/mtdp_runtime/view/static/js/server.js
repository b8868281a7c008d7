// What the page asks the server for; a refusal is an Error whose message and hint are for the reader.

async function ask(path) {
  let answer;
  try {
    answer = await fetch(path);
  } catch {
    throw new Error("mtdp-view does not answer: was it stopped? Start it again.");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({ text: `${path}: ${answer.status}` }));
  throw Object.assign(new Error(said.text), { hint: said.hint ?? "" });
}

export const session = async () => (await ask("api/session")).json();
export const slide = async (number) => (await ask(`api/slides/${number}`)).json();
export const json = async (number, what) => (await ask(`api/slides/${number}/${what}`)).json();
export const pictureUrl = (number, level, column, row) => `slides/${number}_files/${level}/${column}_${row}.jpeg`;
export const tileUrl = (number, row) => `slides/${number}_tiles/${row}.jpeg`;

// Numbers as they are in memory there: all machines that run this are little-endian.
export async function numbers(number, what, Kind) {
  return new Kind(await (await ask(`api/slides/${number}/${what}`)).arrayBuffer());
}

export async function why(path) {
  try {
    await ask(path);
    return null;
  } catch (error) {
    return error;
  }
}
