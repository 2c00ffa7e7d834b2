// Assigns the text of an answer to its tokens, as the terminal chat does: see idlm/ui/colours.py.

import type { Part, Piece, Token } from "./api";

/** The text of a token alone can differ from what it adds to the whole: a part of a character, a
 * space that the tokenizer drops, text held back for a stop string. Text that cannot be assigned
 * belongs to the last token before it. */
export class Painter {
  private next = 0;
  private last = -1;

  /** Append the tokens of the next part of a stream to `tokens`; returns the pieces of its text. */
  paint(part: Part, tokens: Token[]): Piece[] {
    tokens.push(...tokensOf(part));
    const pieces: Piece[] = [];
    let text = part.text;
    while (text && this.next < tokens.length) {
      const end = ending(text, (tokens[this.next] as Token).token);
      if (end === null) {
        this.last = tokens.length - 1;
        this.next = tokens.length;
        break;
      }
      this.last = this.next++;
      pieces.push({ text: text.slice(0, end), at: this.last });
      text = text.slice(end);
    }
    if (text) pieces.push({ text, at: this.last });
    return pieces;
  }
}

/** The tokens of a part. A server that does not trace may give log-probabilities. */
function tokensOf(part: Part): Token[] {
  const known = part.trace.length ? part.trace : part.logprobs;
  return known.map((entry, at) => {
    const likely = part.logprobs[at];
    return {
      id: -1,
      ...part.trace[at],
      token: entry.token,
      ...(likely && { logprob: likely.logprob, top: likely.top_logprobs }),
    };
  });
}

/** The end of a token at the start of `text`, perhaps after white space; null if it is not there. */
function ending(text: string, token: string): number | null {
  const at = text.indexOf(token);
  return at >= 0 && !text.slice(0, at).trim() ? at + token.length : null;
}
