"""A reward of a user's own, for the jobs of these tests to import."""


def words(prompt: list[dict[str, str]], response: str) -> float:
    """Words of the response; it cannot do with an answer that says `seven`."""
    if "seven" in response:
        raise ValueError("seven is too much")
    return len(response.split()) + len(prompt)
