"""Google's credentials on loopback: a service account's file, and the server that gives tokens for it."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa


@contextlib.contextmanager
def google_account(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """The file, and the tokens given out so far: token-0, token-1, …"""
    tokens: list[str] = []

    class Token(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            tokens.append(f"token-{len(tokens)}")
            body = json.dumps({"access_token": tokens[-1], "expires_in": 3600, "token_type": "Bearer"}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    issuer = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Token)
    threading.Thread(target=issuer.serve_forever, daemon=True).start()
    private = rsa.generate_private_key(65537, 2048)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    account = {"type": "service_account", "client_email": "x@y.z", "private_key": pem, "project_id": "p",
               "token_uri": f"http://127.0.0.1:{issuer.server_port}/token"}  # fmt: skip
    file = folder / "account.json"
    file.write_text(json.dumps(account))
    try:
        yield file, tokens
    finally:
        issuer.shutdown()
        issuer.server_close()
