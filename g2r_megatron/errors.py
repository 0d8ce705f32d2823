"""The one exception for mistakes that the user can correct."""


class UserError(Exception):
    """Bad input: a config value, data row, checkpoint, tokenizer or layout that cannot work.

    The message is one line naming the option or file, the value found and what would be valid.
    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, where: str, found: str, remedy: str):
        """``where``: option or file; ``found``: the offending value; ``remedy``: what would be valid."""
        self.where, self.found, self.remedy = where, found, remedy
        super().__init__(f"{where}: {found}; {remedy}".replace("\n", " "))
