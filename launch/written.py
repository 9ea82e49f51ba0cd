"""What may stand in files that a cluster keeps, job scripts and manifests: no secret."""

from collections.abc import Sequence

from spade_t5.errors import ConfigError
from spade_t5.messages import is_secret_name, without_credentials


def check_written(words: Sequence[str], env_words: Sequence[str], keeper: str, remedy: str) -> None:
    """Refuses secrets among what is about to be written.

    Args:
        words: the command that is launched.
        env_words: words `NAME` or `NAME=VALUE` of `--env`.
        keeper: who keeps the file, for the message.
        remedy: how a secret gets to the processes instead.

    Raises:
        ConfigError: a variable that is named like a secret has its value with it, or a word holds a credential.
    """
    for word in env_words:
        name, has_value, _ = word.partition("=")
        if has_value and is_secret_name(name):
            raise ConfigError(f"--env: {name} is given with its value, and {keeper}; {remedy}")
    for word in (*words, *env_words):
        if without_credentials(word) != word:
            raise ConfigError(f"{without_credentials(word)}: holds a credential, and {keeper}; {remedy}")
