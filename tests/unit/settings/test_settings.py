"""The settings: how each value is parsed, and how a bad one is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.settings import (
    TABLE,
    Key,
    Settings,
    SettingsError,
    is_loopback,
    load,
    read_environment,
    warnings,
)
from gateway.settings.loading import PLACEHOLDER_KEYS

TOKEN = "sk-lm-AbCdEf12:0123456789abcdefghij"

#: Bad values of every setting, with words that their error message must contain.
BAD = [
    ("LMSTUDIO_BASE_URL", "localhost:1234", "http://"),
    ("LMSTUDIO_BASE_URL", "ftp://localhost", "http://"),
    ("LMSTUDIO_BASE_URL", "http://", "host"),
    ("LMSTUDIO_BASE_URL", "http://host:99999", "port"),
    ("LMSTUDIO_BASE_URL", "http://host:0", "port"),
    ("LMSTUDIO_BASE_URL", "http://host:abc", "port"),
    ("LMSTUDIO_BASE_URL", "http://[::1", "not a URL"),
    ("LMSTUDIO_BASE_URL", "http://host/api", "path"),
    ("LMSTUDIO_BASE_URL", "http://host/?a=b", "path"),
    ("LMSTUDIO_BASE_URL", "http://ho st", "whitespace"),
    ("LMSTUDIO_BASE_URL", "http://user:hunter2@host", "LMSTUDIO_API_TOKEN"),
    ("LMSTUDIO_BASE_URL", "http://user:hunter2@ho\u2100st", ""),
    ("LMSTUDIO_API_TOKEN", "hunter2", "token"),
    ("LMSTUDIO_API_TOKEN", TOKEN + "hunter2", "token"),
    ("GATEWAY_HOST", "a b", "host"),
    ("GATEWAY_HOST", "unix:", "socket"),
    ("GATEWAY_PORT", "65536", "65535"),
    ("GATEWAY_PORT", "-1", "whole number"),
    ("GATEWAY_PORT", "8002.5", "whole number"),
    ("GATEWAY_PORT", "\u0668\u0660", "whole number"),
    ("GATEWAY_API_KEY", "app:", "item 1"),
    ("GATEWAY_API_KEY", "ok, na me:hunter2", "item 2"),
    ("GATEWAY_API_KEY", "app:hunter2 with-space", "item 1"),
    ("GATEWAY_API_KEY", "app:hunter2\u00e9", "item 1"),
    ("GATEWAY_ADMIN_KEY", ":hunter2", "item 1"),
    ("ALLOW_UNAUTHENTICATED", "maybe", "true or false"),
    ("REQUIRE_AUTH_FOR_HEALTH", "2", "true or false"),
    ("IP_ALLOWLIST", "10.0.0.0/33", "10.0.0.0/33"),
    ("IP_ALLOWLIST", "10.0.0.0/8,somebody", "somebody"),
    ("IP_ALLOWLIST", "unix", "unix"),
    ("TRUSTED_PROXIES", "*", "*"),
    ("LOG_LEVEL", "loud", "error, warn, info, debug"),
    ("LOG_FORMAT", "xml", "text, json"),
    ("PROXY_TIMEOUT", "-5", "whole number"),
    ("PROXY_TIMEOUT", "2m", "whole number"),
    ("PROXY_STREAM_TIMEOUT", "1e3", "whole number"),
    ("MAX_BODY_BYTES", "0", "whole number"),
    ("MAX_BODY_BYTES", "64MB", "whole number"),
    ("MAX_BODY_BYTES", "9" * 5000, "whole number"),
    ("SDK_MAX_ATTEMPTS", "0", "whole number"),
    ("SDK_RETRY_DELAY", "two", "whole number"),
    ("STATE_URL", "postgres://user:hunter2@host/db", "sqlite:///"),
    ("STATE_URL", "sqlite://relative.db", "sqlite:///"),
    ("STATE_URL", "sqlite:///", "file path"),
    ("STATE_URL", "redis://user:hunter2@ho\u2100st", ""),
    ("STATE_URL", "redis://host/zero", "number"),
    ("STATE_URL", "redis://host/0/1", "number"),
    ("STATE_URL", "redis://host/-1", "number"),
    ("STATE_URL", "redis://host/0?db=zero", "number"),
    ("STATE_URL", "redis://:hunter2@host:abc/0", "port"),
    ("STATE_URL", "redis://:hunter2@host:99999/0", "port"),
    ("STATE_URL", "redis:///0", "host"),
    ("STATE_URL", "redis://:pass/hunter2@host/0", "host"),
    ("STATE_URL", "redis://:pass#hunter2@host/0", "%23"),
    ("STATE_URL", "redis:hunter2", "redis://"),
    ("STATE_URL", "unix:/run/redis.sock", "unix://"),
    ("STATE_URL", "unix:///run/redis.sock?db=zero", "number"),
    ("CORS_ORIGINS", "https://a.example/path", "origin"),
    ("CORS_ORIGINS", "https://a.example/", "origin"),
    ("CORS_ORIGINS", "https://a.example,nowhere", "'nowhere'"),
    ("CORS_ORIGINS", "https://user:hunter2@a.example", "password"),
    ("CORS_ORIGINS", "https://a.example:99999", "origin"),
    ("CORS_ORIGINS", "https://", "origin"),
    ("CORS_ORIGINS", "app://", "origin"),
    ("CORS_ORIGINS", "*://a.example", "origin"),
    ("CORS_ORIGINS", "https://*.*.example", "more than one"),
    ("CORS_ORIGINS", "http://192.168.1.*", "end with"),
    ("CORS_ORIGINS", "http://localhost*:3000", "end with"),
    ("CORS_ORIGINS", "*", "GATEWAY_API_KEY"),
    ("CORS_ORIGINS", "https://*", "GATEWAY_API_KEY"),
    ("CORS_ORIGINS", "http://*:*", "GATEWAY_API_KEY"),
]


def problems(**settings: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(settings)
    return caught.value.problems


def parsed(variable: str, text: str) -> Any:
    return getattr(load({variable: text}), variable.lower())


@pytest.mark.parametrize(("variable", "text", "words"), BAD)
def test_a_bad_value_is_reported_in_one_line_with_variable_reason_and_example(
    variable: str, text: str, words: str
) -> None:
    (line,) = problems(**{variable: text})
    example = next(setting.example for setting in TABLE if setting.variable == variable)
    assert line.startswith(f"{variable}: ")
    assert words in line
    assert example in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("variable", "text"), [(variable, text) for variable, text, _ in BAD if "hunter2" in text]
)
def test_an_error_message_never_contains_a_secret(variable: str, text: str) -> None:
    assert "hunter2" not in "".join(problems(**{variable: text}))


def test_every_setting_has_a_bad_value_here() -> None:
    assert {variable for variable, _, _ in BAD} == {setting.variable for setting in TABLE}


def test_several_problems_are_reported_at_once() -> None:
    found = problems(GATEWAY_PORT="x", LOG_LEVEL="loud", PROXY_TIMEOUT="y")
    assert [line.partition(":")[0] for line in found] == [
        "GATEWAY_PORT",
        "LOG_LEVEL",
        "PROXY_TIMEOUT",
    ]


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = load({})
    assert settings.lmstudio_base_url == "http://127.0.0.1:1234"
    assert (settings.gateway_host, settings.gateway_port) == ("127.0.0.1", 8002)
    assert settings.gateway_api_key == settings.gateway_admin_key == ()
    assert settings.lmstudio_api_token == settings.state_url == ""
    assert settings.ip_allowlist.everybody
    assert not settings.trusted_proxies.networks
    assert not settings.trusted_proxies.unix
    assert settings.require_auth_for_health is settings.allow_unauthenticated is False
    assert (settings.log_level, settings.log_format) == ("info", "text")
    assert (settings.proxy_timeout, settings.proxy_stream_timeout) == (120.0, None)
    assert settings.max_body_bytes == 67_108_864
    assert (settings.sdk_max_attempts, settings.sdk_retry_delay) == (3, 2.0)
    assert settings.cors_origins == frozenset()


def test_the_table_matches_the_attributes_and_has_valid_defaults_and_examples() -> None:
    assert {setting.attribute for setting in TABLE} == set(Settings.__dataclass_fields__)
    for setting in TABLE:
        setting.parse(setting.default)
        setting.parse(setting.example)


def test_an_empty_value_means_the_default() -> None:
    assert load({"GATEWAY_PORT": "", "LOG_LEVEL": "  "}) == load({})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://host:1234", "http://host:1234"),
        ("http://host:1234/", "http://host:1234"),
        ("http://host:1234/v1", "http://host:1234"),
        (" http://host:1234/v1/ ", "http://host:1234"),
        ("https://host", "https://host"),
        ("http://[::1]:1234", "http://[::1]:1234"),
    ],
)
def test_the_base_url_may_end_with_a_slash_or_v1(text: str, expected: str) -> None:
    assert parsed("LMSTUDIO_BASE_URL", text) == expected


def test_several_keys_may_be_set_and_each_has_a_name() -> None:
    assert parsed("GATEWAY_API_KEY", "plain, app:s3cr3t ,,ops:a:b") == (
        Key("key-1", "plain"),
        Key("app", "s3cr3t"),
        Key("ops", "a:b"),
    )


def test_addresses_and_networks_may_be_ipv4_or_ipv6() -> None:
    found = parsed("IP_ALLOWLIST", "10.1.2.3/8, ::1,fe80::/10")
    assert [str(network) for network in found.networks] == ["10.0.0.0/8", "::1/128", "fe80::/10"]
    assert not found.everybody
    assert parsed("IP_ALLOWLIST", "10.0.0.1,*").everybody
    assert parsed("TRUSTED_PROXIES", "unix,127.0.0.1").unix


@pytest.mark.parametrize("text", ["true", "TRUE", "1", "yes", "on"])
def test_a_boolean_accepts_the_usual_words(text: str) -> None:
    assert parsed("REQUIRE_AUTH_FOR_HEALTH", text) is True
    assert parsed("REQUIRE_AUTH_FOR_HEALTH", "off") is False


def test_times_are_given_in_milliseconds_and_0_means_no_limit() -> None:
    assert parsed("PROXY_TIMEOUT", "1500") == 1.5
    assert parsed("PROXY_TIMEOUT", "0") is None
    assert parsed("PROXY_STREAM_TIMEOUT", "250") == 0.25
    assert parsed("SDK_RETRY_DELAY", "0") == 0


def test_choices_are_case_insensitive() -> None:
    assert parsed("LOG_LEVEL", "DEBUG") == "debug"
    assert parsed("LOG_FORMAT", "Json") == "json"


def test_state_urls_origins_and_tokens_are_kept_unchanged() -> None:
    assert parsed("STATE_URL", "sqlite:////var/x.db") == "sqlite:////var/x.db"
    assert parsed("STATE_URL", "redis://host:6379/0") == "redis://host:6379/0"
    assert parsed("CORS_ORIGINS", "https://a.example,http://b:8080") == {
        "https://a.example",
        "http://b:8080",
    }
    assert parsed("LMSTUDIO_API_TOKEN", TOKEN) == TOKEN


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("app://obsidian.md", "app://obsidian.md"),
        ("vscode-webview://*", "vscode-webview://*"),
        ("chrome-extension://abc, null", "chrome-extension://abc null"),
        ("file://", "file://"),
        ("HTTPS://A.Example:443", "https://a.example"),
        ("http://[::1]:80,http://b:443", "http://[::1] http://b:443"),
        ("http://localhost:*", "http://localhost:*"),
    ],
)
def test_origins_are_kept_in_the_form_in_which_browsers_send_them(text: str, expected: str) -> None:
    assert parsed("CORS_ORIGINS", text) == set(expected.split())


def test_every_origin_may_be_allowed_only_where_inference_needs_a_key() -> None:
    assert load({"CORS_ORIGINS": "*", "GATEWAY_API_KEY": "k"}).cors_origins == {"*"}
    (line,) = problems(CORS_ORIGINS="*", GATEWAY_ADMIN_KEY="k")
    assert line.startswith("CORS_ORIGINS: ")


@pytest.mark.parametrize(
    "url",
    ["redis://host", "rediss://u:p@host:6380/3", "redis://[::1]:6379/", "unix:///run/r.sock?db=1"],
)
def test_a_redis_url_is_kept_unchanged(url: str) -> None:
    assert parsed("STATE_URL", url) == url


@pytest.mark.parametrize(
    ("mode", "warns"), [(0o600, False), (0o640, False), (0o644, True), (0o602, True)]
)
def test_a_dotenv_that_other_users_can_read_or_change_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, warns: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    assert warnings() == []
    (tmp_path / ".env").write_text("GATEWAY_API_KEY=hunter2\n")
    (tmp_path / ".env").chmod(mode)
    assert [line.partition(":")[0] for line in warnings()] == ([".env"] if warns else [])
    assert "hunter2" not in "".join(warnings())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "gateway.example"])
def test_a_reachable_host_without_a_key_is_rejected(host: str) -> None:
    (line,) = problems(GATEWAY_HOST=host)
    assert line.startswith("GATEWAY_API_KEY: ")
    assert "ALLOW_UNAUTHENTICATED=true" in line
    assert load({"GATEWAY_HOST": host, "ALLOW_UNAUTHENTICATED": "true"}).gateway_host == host
    assert load({"GATEWAY_HOST": host, "GATEWAY_ADMIN_KEY": "s3cr3t"}).gateway_host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "unix:/s"])
def test_a_loopback_host_needs_no_key(host: str) -> None:
    assert is_loopback(load({"GATEWAY_HOST": host}).gateway_host)


@pytest.mark.parametrize("placeholder", sorted(PLACEHOLDER_KEYS))
def test_a_placeholder_key_is_rejected_on_a_reachable_host(placeholder: str) -> None:
    reachable = {"GATEWAY_HOST": "0.0.0.0", "ALLOW_UNAUTHENTICATED": "true"}
    for key in (placeholder, f"app:{placeholder.upper()}", f"good,app:{placeholder}"):
        (line,) = problems(GATEWAY_ADMIN_KEY=key, **reachable)
        assert line.startswith("GATEWAY_ADMIN_KEY: ")
        assert "placeholder" in line
    assert load({"GATEWAY_API_KEY": placeholder}).gateway_api_key[0].secret == placeholder


def test_the_environment_wins_over_dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("GATEWAY_PORT=9001\nLOG_LEVEL='debug'\nLOG_FORMAT\n")
    monkeypatch.chdir(tmp_path)
    for setting in TABLE:
        monkeypatch.delenv(setting.variable, raising=False)
    assert (load().gateway_port, load().log_level, load().log_format) == (9001, "debug", "text")
    monkeypatch.setenv("GATEWAY_PORT", "9002")
    assert load().gateway_port == 9002
    assert read_environment()["LOG_LEVEL"] == "debug"


def test_a_dotenv_that_is_not_text_is_reported_as_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_bytes(b"GATEWAY_PORT=9001\nLOG_LEVEL=\xff\xfe\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"\.env"):
        load()
