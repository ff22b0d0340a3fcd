"""A small Hub on this machine, for the real huggingface_hub client: repositories, branches, LFS, commits, downloads.

What it does not know it answers with 404. `faults` makes it fail: {"PUT": 2} drops the next two uploads half-way,
{"commit": 1} answers the next commit with 503.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKENS = {"hf_writer": "me", "hf_stranger": "them"}
LARGE = 1000  # bytes from which a file goes through LFS


class Hub(ThreadingHTTPServer):
    """`with Hub() as hub: ... hub.endpoint`"""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repo -> branch -> path -> content
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.faults: Counter[str] = Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>.+)", "branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", "preupload"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/upload/(?P<oid>\w+)", "upload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", "commit"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/.*)?", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?", "info"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def route(self) -> None:
        path = unquote(urlparse(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        if self.fails(self.command):
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(length)
        for method, pattern, name in self.ROUTES:
            found = re.fullmatch(pattern, path)
            if method == self.command and found and self.fails(name):
                self.answer({"error": "busy"}, 503)
                return
            if method == self.command and found:
                getattr(self, name)(**{key: value for key, value in found.groupdict().items() if value})
                return
        self.answer({"error": "not found"}, 404)

    def fails(self, what: str) -> bool:
        due = self.server.faults[what] > 0
        self.server.faults[what] -= due
        return due

    do_GET = do_POST = do_PUT = do_HEAD = route

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def user(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def may_write(self, repo: str) -> bool:
        if self.user is None:
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.user != repo.split("/")[0]:
            self.answer({"error": "You don't have the rights to write here."}, 403)
        else:
            return True
        return False

    # --- writing -----------------------------------------------------------------------------------------------------

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or self.user}/{asked['name']}"
        if not self.may_write(repo):
            return
        if repo in self.server.repos:
            self.answer({"url": f"{self.server.endpoint}/{repo}", "error": "You already created this model repo"}, 409)
            return
        self.server.repos[repo] = {"main": {}}
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(repo)
        self.answer({"url": f"{self.server.endpoint}/{repo}", "name": repo})

    def validate(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def branch(self, repo: str, revision: str) -> None:
        if self.may_write(repo):
            branches = self.server.repos[repo]
            if revision in branches:
                self.answer({"error": "exists"}, 409)
                return
            branches[revision] = dict(branches["main"])
            self.answer({})

    def preupload(self, repo: str, revision: str) -> None:
        if self.may_write(repo):
            files = json.loads(self.body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LARGE else "regular", "shouldIgnore": False}
                for f in files
            ]
            self.answer({"files": modes})

    def batch(self, repo: str) -> None:
        if self.may_write(repo):
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                known = wanted["oid"] in self.server.objects
                href = f"{self.server.endpoint}/upload/{wanted['oid']}"
                objects.append({**wanted} if known else {**wanted, "actions": {"upload": {"href": href}}})
            self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.answer({"error": "checksum"}, 400)
            return
        self.server.objects[oid] = self.body
        self.answer({})

    def commit(self, repo: str, revision: str) -> None:
        if not self.may_write(repo):
            return
        new: dict[str, bytes] = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                new[value["path"]] = self.server.objects[value["oid"]]
        self.server.repos[repo][revision].update(new)
        oid = self.sha(repo, revision)
        url = f"{self.server.endpoint}/{repo}/commit/{oid}"
        self.answer({"commitUrl": url, "commitOid": oid, "success": True})

    # --- reading -----------------------------------------------------------------------------------------------------

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        branches = self.server.repos.get(repo, {})
        by_commit = {self.sha(repo, branch): files for branch, files in branches.items()}
        found = branches.get(revision, by_commit.get(revision))
        if found is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return found

    def sha(self, repo: str, revision: str) -> str:
        parts = sorted(
            (path, hashlib.sha256(text).hexdigest()) for path, text in self.server.repos[repo][revision].items()
        )
        return hashlib.sha1(json.dumps(parts).encode()).hexdigest()

    def info(self, repo: str, revision: str = "main") -> None:
        files = self.files(repo, revision)
        if files is not None:
            sha = self.sha(repo, revision) if revision in self.server.repos[repo] else revision
            siblings = [{"rfilename": path} for path in files]
            self.answer({"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def tree(self, repo: str, revision: str) -> None:
        files = self.files(repo, revision)
        if files is not None:
            self.answer(
                [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in files.items()
                ]
            )

    def resolve(self, repo: str, revision: str, path: str) -> None:
        files = self.files(repo, revision)
        if files is None:
            return
        if path not in files:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return
        sha = self.sha(repo, revision) if revision in self.server.repos[repo] else revision
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        self.answer(files[path], ETag=etag, X_Repo_Commit=sha, X_Linked_Size=str(len(files[path])))
