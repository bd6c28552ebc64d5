"""What an admin may set: environment variables first, then a commented file of the same names.

The names that Label Studio's users know are kept as they are; ours begin with `ML_BACKEND_`.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from ml_backend.extensions import PRESETS, STRATEGIES
from ml_backend.machine import usable_cores

DEFAULT_FILE = Path("config/default.env")
"""Read from the working directory where it exists, unless `ML_BACKEND_CONFIG` names another."""

_OURS = "ML_BACKEND_"
_REMOVED = {
    "QUEUE_URL": "the queue lies in the database now (DATABASE_URL): remove the setting",
}
"""Settings of earlier releases, with the remedy for each."""
_UNCHECKED = {"ML_BACKEND_CONFIG"}


class SettingsError(ValueError):
    """A setting is unknown or wrong; the text is one line that names it and the remedy."""


def _named(name: str, default: Any, **constraints: Any) -> Any:
    return Field(default, validation_alias=name, validate_default=False, **constraints)


class Settings(BaseSettings):
    """Every setting, its default and what it does. `config/default.env` documents them for admins.

    Times are in seconds, sizes in bytes unless the name says otherwise.
    """

    model_config = SettingsConfigDict(extra="ignore", env_ignore_empty=True, frozen=True)

    # Label Studio
    label_studio_url: str | None = _named("LABEL_STUDIO_URL", None)
    label_studio_api_key: SecretStr | None = _named("LABEL_STUDIO_API_KEY", None)

    # The server
    host: str = _named("HOST", "127.0.0.1")
    port: int = _named("PORT", 9090, ge=1, le=65535)
    workers: int = _named("WORKERS", 1, ge=1)
    threads: int = _named("THREADS", 64, ge=2)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _named("LOG_LEVEL", "INFO")
    basic_auth_user: str | None = _named("BASIC_AUTH_USER", None)
    basic_auth_pass: SecretStr | None = _named("BASIC_AUTH_PASS", None)
    webhook_secret: SecretStr | None = _named("ML_BACKEND_WEBHOOK_SECRET", None)
    allow_open: bool = _named("ML_BACKEND_ALLOW_OPEN", False)
    max_request_bytes: int = _named("ML_BACKEND_MAX_REQUEST_BYTES", 256 * 2**20, gt=0)

    # State
    model_dir: Path = _named("MODEL_DIR", Path("data"))
    database_url: str | None = _named("DATABASE_URL", None)
    host_name: str = _named("ML_BACKEND_HOST_NAME", "", pattern=r"^[\w.-]{0,100}$")
    artefacts_url: str | None = _named("ML_BACKEND_ARTEFACTS_URL", None)

    # The detector
    preset: str = _named("ML_BACKEND_PRESET", "auto")
    weights: str = _named("ML_BACKEND_WEIGHTS", "auto")
    device: str = _named("ML_BACKEND_DEVICE", "auto")
    predict_deadline: float = _named("ML_BACKEND_PREDICT_DEADLINE", 90.0, gt=0)

    # Images
    image_max_bytes: int = _named("ML_BACKEND_IMAGE_MAX_BYTES", 50 * 2**20, gt=0)
    image_max_pixels: int = _named("ML_BACKEND_IMAGE_MAX_PIXELS", 100_000_000, gt=0)
    image_timeout: float = _named("ML_BACKEND_IMAGE_TIMEOUT", 20.0, gt=0)
    allowed_image_hosts: tuple[str, ...] = _named("ML_BACKEND_ALLOWED_IMAGE_HOSTS", ())
    image_cache_bytes: int = _named("ML_BACKEND_IMAGE_CACHE_BYTES", 2 * 2**30, ge=0)

    # Learning
    live_min: int = _named("ML_BACKEND_LIVE_MIN", 3, ge=0)
    train_every: int = _named("ML_BACKEND_TRAIN_EVERY", 10, ge=1)
    train_growth: float = _named("ML_BACKEND_TRAIN_GROWTH", 0.25, ge=0)
    train_min: int = _named("ML_BACKEND_TRAIN_MIN", 10, ge=2)
    train_delay: float = _named("ML_BACKEND_TRAIN_DELAY", 30.0, ge=0)
    train_budget: float = _named("ML_BACKEND_TRAIN_BUDGET", 900.0, gt=0)
    train_threads: int | None = _named("ML_BACKEND_TRAIN_THREADS", None, ge=1)
    keep_versions: int = _named("ML_BACKEND_KEEP_VERSIONS", 5, ge=1)

    # What is asked next, and what is drawn
    strategy: str = _named("ML_BACKEND_STRATEGY", "diverse")
    random_share: float = _named("ML_BACKEND_RANDOM_SHARE", 0.1, ge=0, le=1)
    auto_label: bool = _named("ML_BACKEND_AUTO_LABEL", True)
    auto_label_shard: int = _named("ML_BACKEND_AUTO_LABEL_SHARD", 2000, ge=1)
    blind_share: float = _named("ML_BACKEND_BLIND_SHARE", 0.0, ge=0, le=0.5)

    # What people's work costs, in seconds
    cost_look: float = _named("ML_BACKEND_COST_LOOK", 3.3, ge=0)
    cost_draw: float = _named("ML_BACKEND_COST_DRAW", 7.0, gt=0)
    cost_correct: float = _named("ML_BACKEND_COST_CORRECT", 4.0, ge=0)
    cost_delete: float = _named("ML_BACKEND_COST_DELETE", 1.5, gt=0)
    cost_relabel: float = _named("ML_BACKEND_COST_RELABEL", 2.0, ge=0)

    @field_validator("label_studio_url", mode="after")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        # It stands in logs, errors and /metrics.
        if value is not None and "@" in urlsplit(value).netloc:
            raise ValueError("must hold no user and password: the token says who asks")
        return value.rstrip("/") if value else value

    @field_validator("allowed_image_hosts", mode="before")
    @classmethod
    def _hosts(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        hosts = tuple(part.strip() for part in value.split(",") if part.strip())
        for host in hosts:
            try:
                ipaddress.ip_network(host, strict=False)
            except ValueError:
                if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", host) or re.fullmatch(r"[\d.]+", host):
                    raise ValueError(
                        "must be hosts, addresses or networks with commas between them, like "
                        f"minio,10.0.0.7,192.168.0.0/16, and {host} is none of these"
                    ) from None
        return hosts

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str) -> str:
        if value != "auto" and value not in PRESETS and ":" not in value:
            raise ValueError(
                f"must be auto, {', '.join(PRESETS)}, or the import path of a preset "
                "(package.module:name)"
            )
        return value

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(f"must be one of {', '.join(STRATEGIES)}")
        return value

    @field_validator("artefacts_url")
    @classmethod
    def _artefact_store(cls, value: str | None) -> str | None:
        if value is None or "://" not in value:
            return value
        scheme, _, rest = value.partition("://")
        if scheme not in {"s3", "gs"} or not rest.partition("/")[0]:
            raise ValueError("must be a folder, s3://bucket/prefix or gs://bucket/prefix")
        if "@" in rest.partition("/")[0]:
            raise ValueError(
                "must hold no credentials: the environment gives them, AWS_ACCESS_KEY_ID or "
                "GOOGLE_APPLICATION_CREDENTIALS for example"
            )
        return value.rstrip("/")

    @field_validator("weights")
    @classmethod
    def _readable_weights(cls, value: str) -> str:
        if value not in {"auto", "none"} and not Path(value).is_file():
            raise ValueError(f"must be auto, none, or a file; there is no file {value}")
        return value

    @field_validator("device")
    @classmethod
    def _device_name(cls, value: str) -> str:
        kind, _, index = value.partition(":")
        if value not in {"auto", "cpu", "cuda"} and not (kind == "cuda" and index.isdigit()):
            raise ValueError("must be auto, cpu, cuda or cuda:N")
        return value

    @field_validator("database_url")
    @classmethod
    def _database(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if value.startswith(("postgres://", "postgresql://")):
            value = "postgresql+psycopg://" + value.split("://", 1)[1]
        if not value.startswith(("sqlite:///", "postgresql+psycopg://")):
            raise ValueError("must begin with sqlite:/// or postgresql://")
        try:
            make_url(value)
        except (ArgumentError, ValueError):
            raise ValueError("must be like postgresql://user:password@host:5432/name") from None
        return value

    @model_validator(mode="after")
    def _both_or_neither(self) -> Settings:
        if (self.basic_auth_user is None) != (self.basic_auth_pass is None):
            missing = "BASIC_AUTH_PASS" if self.basic_auth_pass is None else "BASIC_AUTH_USER"
            raise ValueError(f"{missing} is missing: basic authentication needs a user and a pass")
        user, password = self.basic_auth or ("", "")
        secret = self.webhook_secret.get_secret_value() if self.webhook_secret else ""
        for name, text in {
            "BASIC_AUTH_USER": user,
            "BASIC_AUTH_PASS": password,
            "ML_BACKEND_WEBHOOK_SECRET": secret,
        }.items():
            try:
                text.encode("latin-1")
            except UnicodeEncodeError:
                raise ValueError(
                    f"{name} has letters that Label Studio cannot send: use those of Latin-1"
                ) from None
        if secret != secret.strip() or "\n" in secret or "\r" in secret:
            raise ValueError(
                "ML_BACKEND_WEBHOOK_SECRET begins or ends with a space, or has several lines: no "
                "header can carry that"
            )
        return self

    @property
    def database(self) -> str:
        """SQLAlchemy URL of the database; a SQLite file below `model_dir` by default."""
        return self.database_url or f"sqlite:///{self.model_dir.absolute() / 'ml-backend.db'}"

    @property
    def this_host(self) -> str:
        """Name of this host, as jobs and locks carry it."""
        return self.host_name or socket.gethostname()

    @property
    def basic_auth(self) -> tuple[str, str] | None:
        """User and password of basic authentication, where it is on."""
        if self.basic_auth_user is None or self.basic_auth_pass is None:
            return None
        return self.basic_auth_user, self.basic_auth_pass.get_secret_value()

    @property
    def own_url(self) -> str:
        """Its own address, as this machine reaches it."""
        host = "127.0.0.1" if self.host in {"0.0.0.0", "::"} else self.host  # noqa: S104
        return f"http://{host}:{self.port}"

    def check_exposure(self) -> None:
        """Refuses to listen where others could use it as they like, unless that was asked for.

        Raises:
            SettingsError: other machines can reach it, and nothing asks them who they are.
        """
        try:
            here = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            here = self.host == "localhost"
        if here or self.allow_open or self.basic_auth is not None:
            return
        raise SettingsError(
            f"HOST: other machines can reach {self.host}, and without a password any of them "
            "could use this backend: set BASIC_AUTH_USER and BASIC_AUTH_PASS, or say that this is "
            "meant with ML_BACKEND_ALLOW_OPEN=true"
        )

    @property
    def makes_live_heads(self) -> bool:
        """Whether heads are fitted to the first annotations: they need pretrained weights."""
        return self.live_min > 0 and self.weights != "none"

    @property
    def predicts_at_a_time(self) -> int:
        """Requests to predict that a process works on; the other threads are for the others."""
        return max(self.threads // 2, self.threads - 8)

    @property
    def training_threads(self) -> int:
        """Counts the cores that a training may use: half, so that predictions keep the others."""
        return self.train_threads or max(1, usable_cores() // 2)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Values come from `load_settings` alone, which knows where each came from."""
        return (init_settings,)


def setting_names() -> dict[str, str]:
    """Environment name of every setting, by field name."""
    return {field: str(info.validation_alias) for field, info in Settings.model_fields.items()}


def load_settings(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Reads the settings: `overrides`, then the environment, then the file, then the defaults.

    Args:
        environ: the environment; `os.environ` where not given.
        overrides: values by environment name (a command line's options).

    Raises:
        SettingsError: a setting is unknown or wrong, or the file named cannot be read.
    """
    environ = os.environ if environ is None else environ
    names = set(setting_names().values())
    file = Path(environ.get("ML_BACKEND_CONFIG", DEFAULT_FILE))
    if "ML_BACKEND_CONFIG" in environ and not file.is_file():
        raise SettingsError(f"ML_BACKEND_CONFIG: there is no file {file}")
    from_file = {k: v for k, v in dotenv_values(file).items() if v} if file.is_file() else {}

    for name, remedy in _REMOVED.items():
        if environ.get(name) or name in from_file:
            raise SettingsError(f"{name}: {remedy}")
    for name in from_file:
        if name not in names:
            raise SettingsError(_unknown(name, names, f" in {file}"))
    for name in environ:
        if name.startswith(_OURS) and name not in names | _UNCHECKED:
            raise SettingsError(_unknown(name, names, ""))

    given = {k: v for k, v in environ.items() if k in names and v}
    try:
        return Settings(**{**from_file, **given, **overrides})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        # Secrets are named, never shown.
        secret = any(word in name for word in ("KEY", "PASS", "SECRET", "URL"))
        shown = "" if secret or not name else f" (it is {first['input']!r})"
        raise SettingsError(f"{name}: {message}{shown}" if name else message) from None


def _unknown(name: str, names: set[str], where: str) -> str:
    close = difflib.get_close_matches(name, names, 1)
    remedy = f"did you mean {close[0]}?" if close else "remove it, or see config/default.env"
    return f"{name}{where} is not a setting: {remedy}"
