"""Generation of text: prompts, the choice of tokens, and the loop that continues texts in any layout."""
