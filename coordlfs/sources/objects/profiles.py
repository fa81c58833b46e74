"""Keys in the files of AWS's own tools, which obstore does not read: in `~/.aws/credentials` and `~/.aws/config`.

Only keys that stand there: what a profile gets by other programs (sso, credential_process, a role) is not looked for.
It asks nobody, and tells nobody but obstore a key.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from obstore.store import S3Credential

_READ_AGAIN_AFTER = timedelta(minutes=5)  # whoever renews keys writes them to the file


class Profile:
    """The profile that the environment names. Called, it says its keys; KeyError once they are gone."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        home = Path(environment.get("HOME", "/"), ".aws")
        self.name = environment.get("AWS_PROFILE") or environment.get("AWS_DEFAULT_PROFILE") or "default"
        self._credentials = environment.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials"
        self._config = environment.get("AWS_CONFIG_FILE") or home / "config"

    def _section(self, file: str | Path, name: str) -> Mapping[str, str]:
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(file)
            return parser[name]
        except (OSError, configparser.Error, KeyError, UnicodeDecodeError):
            return {}

    @property
    def has_keys(self) -> bool:
        """Whether there are any."""
        return "aws_access_key_id" in self._section(self._credentials, self.name)

    @property
    def region(self) -> str | None:
        """Where its buckets are."""
        section = self.name if self.name == "default" else f"profile {self.name}"
        return self._section(self._config, section).get("region")

    def __call__(self) -> S3Credential:
        """The keys as the file has them now."""
        keys = self._section(self._credentials, self.name)
        return {
            "access_key_id": keys["aws_access_key_id"],
            "secret_access_key": keys["aws_secret_access_key"],
            "token": keys.get("aws_session_token"),
            "expires_at": datetime.now(UTC) + _READ_AGAIN_AFTER,
        }
