"""Chat prompts of 30 to 120 tokens, for questions with long answers."""

from __future__ import annotations

from idlm import LLM
from idlm.evaluation.workload import Request

QUESTIONS = (
    "Write a long story about a lighthouse keeper who finds a map.",
    "Explain in detail how a steam engine turns heat into motion, part by part.",
    "Describe a week of travel through Japan, day by day.",
    "I have potatoes, onions, two eggs, some flour and a piece of hard cheese at home. Tell me three dishes that I can "
    "cook from these alone, with every step and the time it takes.",
    "Write an essay on why people keep gardens.",
    "What are the differences between a lake, a pond, a lagoon and a reservoir? Give a paragraph to each of them and "
    "name well known examples.",
    "Tell me about the history of the bicycle.",
    "A friend of mine wants to learn to play the piano at the age of fifty and has half an hour a day. She has an old "
    "electric piano, no teacher, and likes folk songs and slow film music. Write a plan for her first three months, "
    "week by week, and say how she can tell whether she is getting better.",
    "Give me a long list of ideas for a birthday party in a small flat.",
    "Explain how rainbows form, and why there are sometimes two of them. Use no formulas, but be thorough.",
    "Write a letter to a city council that asks for a safer crossing near a school. Mention that forty children cross "
    "there each morning, that cars come round the bend too fast, and that two accidents happened last winter.",
    "Describe how bread is made, from the field to the table.",
    "Compare living in a village with living in a big city: work, friends, shops, noise, and getting around. Write "
    "several paragraphs.",
    "Write a dialogue between the sun and the moon.",
    "Summarise what a beginner should know about first aid: what to do for cuts, burns, a sprained ankle, a nosebleed "
    "and a person who has fainted, in which order, and when to call for help. Write for somebody who has never heard "
    "of any of it before, in plain words and with a short reason for every step.",
    "Explain what a computer does between the moment it is switched on and the moment you can use it.",
)


def draw(llm: LLM, count: int, seed: int, tokens: int) -> list[Request]:
    """`count` requests of `tokens` output tokens each; lengths are mixed alike for every seed.

    Each conversation begins with a number of its own, so that prompts share only their first few
    tokens and no prefix cache helps.
    """
    first = seed * count
    return [
        request(llm, first + at, QUESTIONS[(first + at) % len(QUESTIONS)], tokens)
        for at in range(count)
    ]


def request(llm: LLM, conversation: int, question: str, tokens: int) -> Request:
    """A question through the model's chat template."""
    system = f"{conversation} is the number of this conversation. You are a helpful assistant."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return Request(llm.encode_chat(messages), tokens)
