"""Who may ask, against a real server: keys and tokens that are wrong in every way, limits, and what a stranger may try with headers and paths."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from checkout import Checkout
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from guarded import DEAN, Running, serving
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from titanic_mlops.ground.errors import SettingsError
from titanic_mlops.ground.settings import Settings
from titanic_mlops.serve.http import Problem
from titanic_mlops.serve.security import (
    Guard,
    Issuer,
    KeyFile,
    KeySet,
    OpenGuard,
    RateLimit,
    open_guard,
    public_keys,
    read_keys,
)

NAME = DEAN["name"]


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


# --- an identity provider


class Provider:
    "Keys and tokens of an OIDC issuer, and its addresses."

    def __init__(self) -> None:
        self.rsa = rsa.generate_private_key(65537, 2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.ed = ed25519.Ed25519PrivateKey.generate()
        public = {
            "rsa": RSAAlgorithm.to_jwk(self.rsa.public_key()),
            "ec": ECAlgorithm.to_jwk(self.ec.public_key()),
            "ed": OKPAlgorithm.to_jwk(self.ed.public_key()),
        }
        self.keys = [json.loads(jwk) | {"kid": kid} for kid, jwk in public.items()]
        self.asked: list[str] = []
        provider = self

        class Pages(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked.append(self.path)
                pages = {
                    "/.well-known/openid-configuration": {
                        "issuer": provider.issuer,
                        "jwks_uri": provider.jwks,
                    },
                    "/jwks": {"keys": provider.keys},
                }
                body = json.dumps(pages.get(self.path, {})).encode()
                self.send_response(302 if self.path == "/moved" else 200)
                self.send_header("Location", provider.jwks)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def issuer(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def jwks(self) -> str:
        return f"{self.issuer}/jwks"

    def token(
        self, kid: str = "rsa", key: Any = None, algorithm: str = "", header: dict | None = None, **claims
    ) -> str:
        "A token that is right, but for what is said."
        own = {"rsa": (self.rsa, "RS256"), "ec": (self.ec, "ES256"), "ed": (self.ed, "EdDSA")}
        now = int(time.time())
        said = {"iss": self.issuer, "aud": "titanic", "sub": "molly", "nbf": now - 1, "exp": now + 600}
        said |= {"scope": "openid predict"} | claims
        said = {name: value for name, value in said.items() if value is not None}
        default = own.get(kid, own["rsa"])
        key = default[0] if key is None else key
        return jwt.encode(said, key or None, algorithm or default[1], {"kid": kid} | (header or {}))


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    found = Provider()
    yield found
    found.server.shutdown()


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    return KeyFile(tmp_path_factory.mktemp("guarded") / "keys.json")


@pytest.fixture(scope="module")
def server(ring: KeyFile, provider: Provider) -> Iterator[Running]:
    "One that takes keys and tokens, and is patient with wrong ones."
    settings = {
        "auth_issuer": provider.issuer,
        "auth_audience": "titanic",
        "auth_failures": "100000",
        "auth_leeway": "0",
    }
    with serving(ring.file.parent, **settings) as running:
        yield running


def until(status: int, ask: Any, seconds: float = 20) -> Any:
    "Ask until that is the answer."
    end = time.monotonic() + seconds
    while (answer := ask()).status_code != status and time.monotonic() < end:
        time.sleep(0.1)
    assert answer.status_code == status, answer.text
    return answer


@pytest.fixture(scope="module")
def key(ring: KeyFile, server: Running) -> str:
    "A key that may predict."
    _, shown = ring.new("tests", ["predict"])
    until(200, lambda: server.post(key=shown))
    return shown


def refusal(answer: Any) -> tuple:
    "What a refusal says, but for the id of the request."
    said = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"].startswith("Bearer ")
    assert said.pop("instance")
    return answer.status_code, said, answer.headers["www-authenticate"]


# --- keys


def test_no_key_no_answer(server: Running, key: str):
    status, said, challenge = refusal(server.post())
    assert (status, challenge) == (401, 'Bearer realm="titanic"')
    assert said["status"] == 401 and said["title"] and said["type"]


def test_every_wrong_key_gets_the_same_words(server: Running, ring: KeyFile, key: str):
    _, expired = ring.new("expired", ["predict"], soon(-1))
    gone, revoked = ring.new("revoked", ["predict"])
    until(200, lambda: server.post(key=revoked))
    ring.revoke(gone.id)
    until(401, lambda: server.post(key=revoked))
    prefix, secret = key[:21], key[21:]
    wrong = [
        expired,
        revoked,
        prefix + secret[::-1],
        f"titanic_{'0' * 12}_{secret}",
        secret,
        "x" * 5000,
    ]
    wrong += [key.upper(), key[:-1], key + "A", "a.b.c", "\N{LATIN SMALL LETTER E WITH ACUTE}" * 64]
    words = {str(refusal(server.post(headers={b"authorization": b"Bearer " + k.encode()}))) for k in wrong}
    assert len(words) == 1, words
    assert "invalid_token" in words.pop()


def test_a_key_comes_in_one_of_three_ways(server: Running, key: str):
    assert server.post(headers={"x-api-key": key}).status_code == 200
    assert server.post(headers={"authorization": f"bearer {key}"}).status_code == 200
    assert server.post(auth=("anybody", key)).status_code == 200
    for both in (
        {"x-api-key": key, "authorization": f"Bearer {key}"},
        {"authorization": key},
        {"authorization": "Basic ?"},
    ):
        assert server.post(headers=both).status_code == 401
    assert server.post(path=f"/v1/predict?api_key={key}").status_code == 401  # never in an address


def test_a_scope_gives_what_it_says(server: Running, ring: KeyFile, key: str):
    _, admin = ring.new("admin", ["admin"])
    until(200, lambda: server.get("/metrics", admin))
    status, _, challenge = refusal(server.post(key=admin))
    assert (status, challenge) == (403, 'Bearer realm="titanic", error="insufficient_scope", scope="predict"')
    assert server.get("/metrics", key).status_code == 403
    assert server.get("/healthz").status_code == 200


def test_no_app_has_an_address_that_the_table_forgets(
    server: Running, key: str, monkeypatch: pytest.MonkeyPatch
):
    for path in (
        "/",
        "/docs",
        "/openapi.json",
        "/healthz",
        "/readyz",
        "/ping",
        "/health",
        "/version",
        "/v2/health/live",
    ):
        assert server.get(path).status_code == 200, path
    for path in ("/nowhere", "/healthzz", "/v1/predictions"):  # nothing is there to be guarded
        assert server.get(path).status_code == 404, path
    for path in ("/v1/model", "/metrics", "/v1/status", "/v1/outcomes", "/v1/predict", "/invocations"):
        for end in ("%0A", "%0a%0a", "%00", "%0D%0A", "%E2%80%A8"):  # a pattern's `$` lets a newline follow
            for ask in (server.get, server.post):
                assert ask(path + end).status_code == 404, path + end
    from titanic_mlops.serve import app

    monkeypatch.setattr(
        app, "SCOPES", {k: v for k, v in app.SCOPES.items() if k not in ("/v1/explain", "/version")}
    )
    with pytest.raises(LookupError, match="/v1/explain, /version"):
        app.create_app(SimpleNamespace(champion=None, state=dict))


def test_rotation_overlaps(server: Running, ring: KeyFile):
    old, old_key = ring.new("rotated", ["predict"], soon(3600))
    new, new_key = ring.rotate(old.id, timedelta(seconds=3))
    until(200, lambda: server.post(key=new_key))
    assert server.post(key=old_key).status_code == 200
    until(401, lambda: server.post(key=old_key))
    assert server.post(key=new_key).status_code == 200
    assert new.name == old.name and abs((new.expires - old.expires).total_seconds()) < 60
    with pytest.raises(SettingsError, match="expired"):
        ring.rotate(old.id)


def test_scopes_that_can_be_read_once(tmp_path: Path):
    ring = KeyFile(tmp_path / "keys.json")
    assert ring.new("x", iter(["admin", "predict"]))[0].scopes == ("predict", "admin")
    with pytest.raises(SettingsError, match="no scope 'predicts'"):
        ring.new("x", iter(["admin", "predicts"]))


def test_many_change_the_keys_at_once(tmp_path: Path):
    ring, made = KeyFile(tmp_path / "keys.json"), []
    threads = [threading.Thread(target=lambda: made.append(ring.new("x", ["predict"])[0])) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {k.id for k in ring.all()} == {k.id for k in made} and len(made) == 16
    assert ring.file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 2, "keys": []}',
        '{"format": 1, "keys": [{"id": "x"}]}',
        '{"format": 1, "keys": 7}',
    ],
)
def test_a_broken_file_of_keys(tmp_path: Path, content: str):
    ring = KeyFile(tmp_path / "keys.json")
    _, shown = ring.new("x")
    guard = Guard(ring.file)
    ask = lambda: guard.check([(b"x-api-key", shown.encode())], "predict", "")
    ring.file.write_text(content)
    ring.file.chmod(0o600)
    guard.keys.look_at = 0
    assert ask().name == "x" and str(ring.file) in guard.trouble  # goes on with what it knew
    with pytest.raises(SettingsError, match=r"keys\.json"):
        Guard(ring.file)  # but does not start with it
    ring.file.unlink()
    guard.keys.look_at = 0
    with pytest.raises(Problem):
        ask()
    assert not guard.trouble


def test_a_file_that_others_may_write(tmp_path: Path):
    ring = KeyFile(tmp_path / "keys.json")
    ring.new("x")
    ring.file.chmod(0o620)
    with pytest.raises(SettingsError, match="others may write"):
        read_keys(ring.file)


def test_the_commands(fresh: Checkout):
    made = fresh.titanic(
        "keys", "new", "--name", "web [page]", "--scope", "predict", "--scope", "explain", "--expires", "90d"
    )
    shown = made.stdout.strip()
    assert made.returncode == 0 and shown.startswith("titanic_") and len(shown) == 64, made.stderr
    id = shown.split("_")[1]
    listed = fresh.titanic("keys", "list").stdout
    assert id in listed and "web [page]" in listed and shown[21:] not in listed + made.stderr
    rotated = fresh.titanic("keys", "rotate", id, "--overlap", "0s")
    assert rotated.returncode == 0 and rotated.stdout.strip() != shown
    assert fresh.titanic("keys", "revoke", id).returncode == 0
    found = {k["id"]: k for k in json.loads(fresh.titanic("keys", "list", "--json").stdout)}
    assert found[id]["state"] == "revoked" and len(found) == 2
    for wrong, word in (
        (["new", "--name", "x", "--scope", "predikt"], "predict"),
        (["revoke", "nobody"], id),
        (["new", "--name", "x", "--expires", "999999w"], "never"),
    ):
        done = fresh.titanic("keys", *wrong)
        assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr, done.stderr


# --- tokens


@pytest.mark.parametrize("kid", ["rsa", "ec", "ed"])
def test_tokens_of_the_issuer(server: Running, provider: Provider, kid: str):
    token = provider.token(kid)
    until(200, lambda: server.post(key=token))
    assert (
        server.post(
            key=provider.token(kid, aud=["other", "titanic"], scope=None, scp=["predict"])
        ).status_code
        == 200
    )
    assert server.post(key=provider.token(kid, scope="openid predicts")).status_code == 403


def test_wrong_tokens(server: Running, provider: Provider, key: str):
    until(200, lambda: server.post(key=provider.token()))
    now, pem = (
        int(time.time()),
        provider.rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    )
    stranger = rsa.generate_private_key(65537, 2048)
    stranger_jwk = json.loads(RSAAlgorithm.to_jwk(stranger.public_key()))
    # PyJWT refuses to sign with a public key as a secret, as a forger would: by hand, then
    head = jwt.utils.base64url_encode(json.dumps({"alg": "HS256", "kid": "rsa"}).encode())
    claims = provider.token().split(".")[1].encode()
    import hashlib
    import hmac

    signed = hmac.new(pem, head + b"." + claims, hashlib.sha256).digest()
    confused = b".".join([head, claims, jwt.utils.base64url_encode(signed)]).decode()
    good = provider.token()
    wrong = {
        "none": provider.token(key="", algorithm="none"),
        "a public key as a secret": confused,
        "HS256": provider.token(key="s" * 64, algorithm="HS256"),
        "RS512": provider.token(algorithm="RS512"),
        "PS256": provider.token(algorithm="PS256"),
        "another's key": provider.token(key=stranger),
        "a key of its own": provider.token(key=stranger, header={"jwk": stranger_jwk}),
        "a key at its own address": provider.token("own", key=stranger, header={"jku": provider.issuer}),
        "a kid of another kind": provider.token("ec", key=provider.rsa, algorithm="RS256"),
        "issuer": provider.token(iss="https://evil.example"),
        "audience": provider.token(aud="another"),
        "no audience": provider.token(aud=None),
        "no issuer": provider.token(iss=None),
        "expired": provider.token(exp=now - 60),
        "no expiry": provider.token(exp=None),
        "not yet": provider.token(nbf=now + 600),
        "no nbf": provider.token(nbf=None),
        "no subject": provider.token(sub=None),
        "empty subject": provider.token(sub=""),
        "long subject": provider.token(sub="x" * 1000),
        "critical": provider.token(header={"crit": ["b64"], "b64": False}),
        "unknown kid": provider.token("nobody"),
        "kid of no text": provider.token(header={"kid": "\u0000"}),
        "no signature": good.rsplit(".", 1)[0] + ".",
        "cut": good[:-4],
        "changed": good.replace(good.split(".")[1][:8], "eyJpc3Mj"),
        "dots": "..",
    }
    for why, token in wrong.items():
        answer = server.post(key=token)
        assert answer.status_code == 401, (why, answer.text)
        assert "invalid_token" in answer.headers["www-authenticate"]


def test_an_expired_token_is_not_remembered(server: Running, provider: Provider):
    token = provider.token(exp=int(time.time()) + 5)
    until(200, lambda: server.post(key=token))
    until(401, lambda: server.post(key=token))


def test_keys_of_the_issuer_are_looked_for_once_a_minute(provider: Provider):
    issuer = Issuer(provider.issuer, "titanic", provider.jwks)
    guard = Guard(Path("nowhere.json"), issuer)
    ask = lambda token: guard.check([(b"authorization", b"Bearer " + token.encode())], "predict", "192.0.2.1")
    deadline = time.monotonic() + 20
    while not issuer.key_set.keys and time.monotonic() < deadline:
        time.sleep(0.01)
    asked = len(provider.asked)
    for n in range(20):
        with pytest.raises(Problem) as refused:
            ask(provider.token(f"unknown {n}"))
        assert refused.value.status_code == 401
    assert len(provider.asked) == asked

    newer = ed25519.Ed25519PrivateKey.generate()
    jwk = json.loads(OKPAlgorithm.to_jwk(newer.public_key())) | {"kid": "newer"}
    provider.keys = [*provider.keys, jwk]
    try:
        issuer.key_set._looked -= KeySet.AGAIN  # a minute later
        token = provider.token("newer", key=newer, algorithm="EdDSA")
        with pytest.raises(Problem) as later:
            ask(token)
        assert later.value.status_code == 503 and later.value.headers["Retry-After"] == "1"
        issuer.key_set._thread.join(20)
        assert ask(token).id == "token:molly"
        assert len(provider.asked) == asked + 1

        provider.keys = provider.keys[:-1]  # withdrawn
        issuer.key_set._looked -= KeySet.STALE
        assert ask(token).id == "token:molly"  # who is known makes us look, too
        issuer.key_set._thread.join(20)
        with pytest.raises(Problem):
            ask(token)
    finally:
        provider.keys = [k for k in provider.keys if k["kid"] != "newer"]


def test_an_issuer_that_is_away(tmp_path: Path, provider: Provider):
    ring = KeyFile(tmp_path / "keys.json")
    _, shown = ring.new("x")
    for away in (
        "http://127.0.0.1:9/jwks",
        "https://localhost:9/jwks",
        "http://login.example/jwks",
        f"{provider.issuer}/moved",
        f"{provider.issuer}/empty",
    ):
        guard = Guard(ring.file, Issuer(provider.issuer, "titanic", away))
        guard.issuer.key_set._thread.join(20)
        assert guard.check([(b"x-api-key", shown.encode())], "predict", "").name == "x"
        with pytest.raises(Problem) as later:
            guard.check([(b"authorization", b"Bearer " + provider.token().encode())], "predict", "")
        assert later.value.status_code == 503 and guard.trouble, away


def test_keys_of_an_issuer_that_goes_away_are_good_for_a_day(tmp_path: Path, provider: Provider):
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps({"keys": provider.keys}))
    issuer = Issuer(provider.issuer, "titanic", str(file))
    guard, keys = Guard(tmp_path / "keys.json", issuer), issuer.key_set
    token = provider.token().encode()
    ask = lambda: guard.check([(b"authorization", b"Bearer " + token)], "predict", "192.0.2.1").id
    assert ask() == "token:molly"
    file.unlink()
    keys._looked -= KeySet.STALE
    assert ask() == "token:molly" and "can't be had" in guard.trouble

    keys._had -= KeySet.KEPT
    keys._looked -= KeySet.AGAIN  # after trouble the next look is a minute later, not ten
    with pytest.raises(Problem) as later:
        ask()
    assert later.value.status_code == 503 and not keys.keys

    file.write_text(json.dumps({"keys": provider.keys}))
    keys._looked -= KeySet.AGAIN
    assert ask() == "token:molly" and not guard.trouble


def test_keys_that_come_while_a_token_is_looked_at(tmp_path: Path, provider: Provider):
    (file := tmp_path / "jwks.json").write_text(json.dumps({"keys": provider.keys}))
    issuer = Issuer(provider.issuer, "titanic", str(file))
    token, now = provider.token().encode(), time.monotonic()
    digest = hashlib.sha256(token).digest()
    arrived, issuer.key_set.keys = issuer.key_set.keys, {}
    assert issuer.known(digest, now) is None
    issuer.key_set.keys = arrived
    found = issuer.verify(token, digest, now)
    assert issuer.known(digest, now) is found  # what the new keys verified stays with them
    issuer.key_set.keys = dict(arrived)
    assert issuer.known(digest, now) is None


def test_keys_that_may_not_sign(provider: Provider):
    short = json.loads(RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 1024).public_key())) | {
        "kid": "short"
    }
    wide = json.loads(ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP384R1()).public_key())) | {
        "kid": "wide"
    }
    secret = {"kty": "oct", "k": "c2VjcmV0", "kid": "secret"}
    seals = provider.keys[0] | {"kid": "seals", "use": "enc"}
    other = provider.keys[0] | {"kid": "other", "alg": "RS512"}
    broken = {"kty": "RSA", "n": "?", "e": "AQAB", "kid": "broken"}
    found = public_keys({"keys": [short, wide, secret, seals, other, broken, *provider.keys]})
    assert {kid: algorithm for kid, (algorithm, _) in found.items()} == {
        "rsa": "RS256",
        "ec": "ES256",
        "ed": "EdDSA",
    }


def test_an_issuer_without_an_audience(tmp_path: Path):
    with pytest.raises(SettingsError, match="auth_audience"):
        open_guard(Settings(store=tmp_path, auth_issuer="https://login.example"))


# --- limits


def test_the_rate_of_a_principal(tmp_path: Path):
    ring = KeyFile(tmp_path / "keys.json")
    (_, one), (_, two) = ring.new("one"), ring.new("two")
    with serving(tmp_path, rate_limit="0.01", rate_burst="3") as running:
        assert [running.post(key=one).status_code for _ in range(5)] == [200, 200, 200, 429, 429]
        answer = running.post(key=one)
        assert 1 <= int(answer.headers["retry-after"]) <= 100
        limits = {name: answer.headers[f"ratelimit-{name}"] for name in ("limit", "remaining")}
        assert limits == {"limit": "3", "remaining": "0"} and int(answer.headers["ratelimit-reset"]) <= 300
        assert running.post(key=two).status_code == 200


def test_a_client_has_one_bucket_however_its_address_is_written(tmp_path: Path):
    guard = Guard(tmp_path / "keys.json", failures=RateLimit(1 / 60, 1))

    def status(client: str) -> int:
        with pytest.raises(Problem) as refused:
            guard.check([(b"x-api-key", b"wrong")], "predict", client)
        return refused.value.status_code

    assert [status("::ffff:192.0.2.1"), status("192.0.2.1"), status("::ffff:192.0.2.1")] == [401, 429, 429]
    assert status("::ffff:192.0.2.2") == 401  # a neighbour, who did nothing wrong before
    assert [status("2001:db8::1"), status("2001:db8::2"), status("2001:db8:0:1::1")] == [401, 429, 401]


def test_wrong_keys_slow_a_client_down(tmp_path: Path, provider: Provider):
    ring = KeyFile(tmp_path / "keys.json")
    _, good = ring.new("good")
    settings = {
        "auth_failures": "5",
        "auth_issuer": provider.issuer,
        "auth_audience": "titanic",
        "auth_jwks": provider.jwks,
    }
    with serving(tmp_path, **settings) as running:
        token = provider.token()
        until(200, lambda: running.post(key=token))
        answers = [running.post(key=f"titanic_{'0' * 12}_{n}") for n in range(40)]
        assert {a.status_code for a in answers} == {401, 429} and answers[0].status_code == 401
        slow = next(a for a in answers if a.status_code == 429)
        assert int(slow.headers["retry-after"]) >= 1
        assert running.post(key=good).status_code == 200  # its neighbours go on
        assert running.post(key=token).status_code == 200
        running.post(key="wrong")
        assert running.post(key=provider.token(sub="other")).status_code in (200, 429)


def test_memory_of_strangers_is_bounded(tmp_path: Path):
    guard = Guard(tmp_path / "keys.json", failures=RateLimit(1, 1, most=500))
    for n in range(5000):
        with pytest.raises(Problem):
            guard.check([(b"x-api-key", b"wrong")], "predict", f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}")
    assert len(guard.failures._full_at) <= 500
    for n in range(300):  # one household of IPv6 is one client
        with pytest.raises(Problem) as refused:
            guard.check([(b"x-api-key", b"wrong")], "predict", f"2001:db8::{n:x}")
    assert refused.value.status_code == 429


# --- without authentication


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.1", "example.com", "127.0.0.1.example.com", "", "localhost."]
)
def test_no_authentication_only_on_this_machine(host: str):
    with pytest.raises(SettingsError, match="loopback"):
        OpenGuard(host)


@pytest.mark.parametrize(
    ("host", "origin", "answered"),
    [
        (b"127.0.0.1:8000", None, True),
        (b"localhost", b"http://localhost:8000", True),
        (b"[::1]:8000", b"http://[::1]:8000", True),
        (b"rebound.example", None, False),
        (b"127.0.0.1.example.com", None, False),
        (b"127.0.0.1", b"https://evil.example", False),
        (b"127.0.0.1", b"null", False),
        (b"", None, False),
    ],
)
def test_no_authentication_only_for_this_machines_pages(host: bytes, origin: bytes | None, answered: bool):
    headers = [(b"host", host), *([(b"origin", origin)] if origin else [])]
    if answered:
        assert OpenGuard("127.0.0.1").check(headers, "predict", "127.0.0.1").id == "anyone"
    else:
        with pytest.raises(Problem):
            OpenGuard("127.0.0.1").check(headers, "predict", "127.0.0.1")


@pytest.mark.parametrize(
    ("client", "answered"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.4.0.7", False),
        ("::ffff:10.4.0.7", False),
        ("2001:db8::1", False),
        ("", False),  # gone before anybody could see who it was
    ],
)
def test_no_authentication_only_for_this_machines_clients(client: str, answered: bool):
    "Whatever `Host` they write: on Ray the socket listens on all addresses."
    guard = OpenGuard("127.0.0.1")
    if answered:
        assert guard.check([(b"host", b"localhost")], "admin", client).id == "anyone"
    else:
        with pytest.raises(Problem) as refused:
            guard.check([(b"host", b"localhost")], "admin", client)
        assert refused.value.status_code == 403


# --- what a stranger may try


OPEN = {
    "/",
    "/docs",
    "/healthz",
    "/readyz",
    "/ping",
    "/health",
    "/version",
    "/v2/health/live",
    "/v2/health/ready",
}


def test_no_address_is_open_by_accident(server: Running):
    said = server.get("/openapi.json").json()["paths"]
    opened = [
        f"{verb} {path}"
        for path, verbs in said.items()
        for verb, one in verbs.items()
        if not one.get("security")
    ]
    assert {line.split()[1] for line in opened} <= OPEN, opened
    assert all(line.startswith("get ") for line in opened)
    for path, verbs in said.items():
        for verb in verbs:
            answer = server.client.request(verb, server.address + path.replace("{", "").replace("}", ""))
            assert answer.status_code == 401 or path in OPEN, (verb, path, answer.status_code)


BODY = json.dumps(DEAN).encode()


def asking(target: bytes, *headers: bytes, method: bytes = b"POST") -> bytes:
    "A request as it goes over the wire."
    lines = [
        method + b" " + target + b" HTTP/1.1",
        b"Host: x",
        b"Connection: close",
        b"Content-Type: application/json",
    ]
    lines += [b"Content-Length: %d" % len(BODY), *headers]
    return b"\r\n".join([*lines, b"", BODY])


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/predict", b"//v1/predict", b"/v1//predict", b"/./v1/predict", b"/v1/x/../predict", b"/v1/%70redict",
        b"/v1/predict/", b"/v1/predict;x", b"/v1/predict%00", b"/v1/predict%0d%0aX: y", b"/V1/predict", b"/v1/predict?x",
        b"/v1/predict#x", b"http://x/v1/predict", b"/healthz/../v1/predict", b"/%2e%2e/v1/predict", b"\\v1\\predict",
        b"/v1%2fpredict", b"/v1/\xc0\xafpredict", b"/invocations", b"/invocations/", b"//invocations",
        b"/v2/models/titanic/infer", b"/v2/../invocations", b"*", b"/v1/model", b"/v1/explain", b"/v1/outcomes", b"/metrics",
    ],
)  # fmt: skip
def test_no_spelling_of_a_path_gets_past_the_guard(server: Running, target: bytes):
    answer = server.raw(asking(target))
    assert answer[:9] in (b"HTTP/1.1 ", b"HTTP/1.0 ", b""), answer
    assert not answer or 300 <= int(answer[9:12]) < 500, answer
    assert b"probability" not in answer and b"predictions" not in answer
    for header in (
        b"X-Original-URL: /healthz",
        b"X-Rewrite-URL: /healthz",
        b"X-Forwarded-For: 127.0.0.1",
        b"X-HTTP-Method-Override: GET",
    ):
        assert b"probability" not in server.raw(asking(target, header))


def test_headers_can_not_be_injected(server: Running, key: str):
    shown = key.encode()
    bearer = b"Authorization: Bearer " + shown
    for header in (
        b"X-Request-Id: a\r\n Set-Cookie: evil=1",
        b"X-Request-Id: a\rSet-Cookie: evil=1",
        b"X-Request-Id: a%0d%0aSet-Cookie: evil=1",
        b"X-Request-Id: \xff\xfe<script>",
        b"X-Request-Id: " + b"a" * 500,
        b"X-Request-Id: a\x00b",
    ):
        answer = server.raw(asking(b"/v1/predict", bearer, header))
        head = answer.partition(b"\r\n\r\n")[0].lower()
        assert b"\nset-cookie" not in head and b"<script" not in head and b"a" * 200 not in head, answer
    for wrong in (
        b"Authorization: Bearer \x00" + shown,
        b"Authorization: Bearer " + shown + b"\x00",
        b"Authorization: Bearer " + shown[:30] + b"\r\n " + shown[30:],
        b"Authorization:\r\n\tBearer x",
        b"Authorization : Bearer " + shown,
        b"Authorization: Bearer " + shown + b"," + shown,
        b"Authorization: Token " + shown,
        b"Proxy-Authorization: Bearer " + shown,
        b"Cookie: authorization=" + shown,
        bearer + b"\r\nX-API-Key: " + shown,
        b"Authorization: Bearer \xc3\xa9" + shown,
    ):
        assert b"probability" not in server.raw(asking(b"/v1/predict", wrong)), wrong


def test_the_log_never_holds_a_key_or_a_name(server: Running, ring: KeyFile, provider: Provider, key: str):
    token = provider.token()
    until(200, lambda: server.post(key=token))
    before = server.access_log.stat().st_size if server.access_log.exists() else 0
    for shown in (key, token):
        headers = {
            "user-agent": f"curl {shown}",
            "x-request-id": shown[:128],
            "referer": shown,
            "traceparent": shown,
        }
        assert (
            server.post(path=f"/v1/predict?key={shown}&name={NAME}", key=shown, headers=headers).status_code
            == 200
        )
        server.get(f"/v1/{shown}/x", shown)
        server.get(f"/v1/%74itanic_{shown[8:]}/x", shown)
        server.post(key=shown, json=DEAN | {"age": NAME})
    deadline = time.monotonic() + 20
    owner = f"titanic_{key[8:20]}_[secret]"  # whose it was can be found
    text = ""
    while (text[before:].count("\n") < 8 or owner not in text) and time.monotonic() < deadline:
        time.sleep(0.1)
        text = server.access_log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) > 8 and {"INFO", "WARNING"} <= {line["severity"] for line in lines}
    for secret in (key[21:], token.split(".")[1], token.split(".")[2], NAME, "Millvina"):
        assert secret not in text
    assert owner in text
    assert f"key:{key[8:20]}" in text and "token:molly" in text
    stored = ring.file.read_text()
    assert key[21:] not in stored
