"""How errors of others are told in one line."""


def brief(error: BaseException) -> str:
    """Kind and message, white space folded, 300 characters at most."""
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
