"""What a user can get wrong, told in one line."""


class InputError(ValueError):
    """Names the input, the problem and the remedy: ``mask: is empty; paint over the wrong part``."""

    def __init__(self, name: str, problem: str, remedy: str):
        super().__init__(f"{name}: {problem}; {remedy}")
        self.name, self.problem, self.remedy = name, problem, remedy
