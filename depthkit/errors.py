"""The error of a setting, and the check that raises it."""


class ConfigError(ValueError):
    """A setting that cannot work; the message names the field, the value and what is allowed."""


def check(condition: bool, field_name: str, value: object, allowed: str) -> None:
    """Raise `ConfigError` naming the field, the value and the allowed range unless `condition`."""
    if not condition:
        raise ConfigError(f"{field_name}={value!r}: must be {allowed}")
