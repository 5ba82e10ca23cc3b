"""The Hub's endpoints that `huggingface_hub` calls to create, fill and read model repositories, on the loopback.

`running_hub` serves them, `run_client` runs the unmodified client against them in a process of its own.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


TOKENS = {"ada": "hf_adas_own_token", "bob": "hf_bobs_own_token"}

CLIENT = """
import json, logging, sys
sys.path[:0] = {tests!r}
answers = {{}}

def outcome(action):
    try:
        return str(action())
    except BaseException as error:
        return f"{{type(error).__name__}}: {{error}}"
"""


@dataclass
class Repository:
    private: bool
    # By ref: the commits, oldest first; each holds all files by path.
    refs: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)

    def commit(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for name, commits in self.refs.items():
            if revision == name:
                return commits[-1]
            for oid, files in commits:
                if oid == revision:
                    return oid, files
        return None

    def add_commit(self, ref: str, files: dict[str, bytes]) -> str:
        history = self.refs.setdefault(ref, [])
        digest = hashlib.sha1(f"{ref}{len(history)}".encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        history.append((digest.hexdigest(), files))
        return digest.hexdigest()


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        users: Names by token.
        failing_uploads: How many uploads of large files break off, from now on.
        requests: Method and path of all requests, in order.
    """

    daemon_threads = True

    def __init__(self, users: dict[str, str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.users = users
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.failing_uploads = 0
        self.requests: list[tuple[str, str]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repositories[repo_id].commit(revision)
        return found[1] if found else {}


@contextmanager
def running_hub(**users: str) -> Iterator[Hub]:
    """A hub whose users are given as `name="token"`."""
    hub = Hub({token: name for name, token in users.items()})
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def run_client(hub, folder, code, user="ada", endpoint=None, **env):
    """Runs `code` in a process of its own, as a user's would be; what it puts in `answers`."""
    tests = [str(folder) for folder in Path(__file__).parents[:2]]
    code = CLIENT.format(tests=tests) + code + "\nprint('\\n' + json.dumps(answers))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={
            **{name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ},
            "HF_ENDPOINT": endpoint or hub.endpoint,
            "HF_TOKEN": TOKENS.get(user, user),
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            **env,
        },
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stdout + result.stderr


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):  # the tests' output is not a server's log
        pass

    def do_GET(self):
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _route(self):
        url = urlsplit(self.path)
        self.server.requests.append((self.command, url.path))
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.query = parse_qs(url.query)
        parts = [unquote(part) for part in url.path.split("/")[1:]]
        if parts[0] == "upload":
            return self._upload(parts[1])
        if parts[:2] == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts[:2] == ["api", "whoami-v2"]:
            user = self._user()
            return self._json({"name": user, "type": "user"}) if user else self._error(401, "", "Invalid credentials")
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(self.body))
        if parts[0] == "api" and parts[1] in ("models", "spaces") and len(parts) >= 4:
            return self._in_repository("/".join(parts[2:4]), parts[4:])
        if parts[0] == "spaces":
            parts = parts[1:]
        if len(parts) > 3 and parts[2] == "resolve":
            return self._in_repository("/".join(parts[:2]), parts[2:])
        if len(parts) > 2 and parts[1].endswith(".git"):
            return self._in_repository(f"{parts[0]}/{parts[1].removesuffix('.git')}", ["lfs"])
        return self._error(404, "", f"no route to {url.path}")

    def _user(self) -> str | None:
        return self.server.users.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _create(self, wanted):
        user = self._user()
        if user is None:
            return self._error(401, "", "Invalid credentials in Authorization header")
        owner = wanted.get("organization") or user
        if owner != user:
            return self._error(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{wanted['name']}"
        spaces = "spaces/" if wanted.get("type") == "space" else ""
        answer = {"url": f"{self.server.endpoint}/{spaces}{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server.repositories:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        repository = Repository(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repository.add_commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.server.repositories[repo_id] = repository
        return self._json(answer)

    def _in_repository(self, repo_id, rest):
        repository, user = self.server.repositories.get(repo_id), self._user()
        owner = repo_id.split("/")[0]
        if (self.headers.get("Authorization") and user is None) or (
            repository is not None and repository.private and user != owner
        ):
            return self._error(401, "RepoNotFound", "Invalid username or password.")
        if repository is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        what, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        if what == "lfs":
            return self._lfs_batch()
        if what == "branch":
            if user != owner:
                return self._error(403, "", "Forbidden: you must be the owner")
            repository.refs.setdefault(revision, list(repository.refs["main"]))
            return self._json({})
        if what == "refs":
            names = [name for name in repository.refs if "/" not in name]
            return self._json(
                {
                    "branches": [
                        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": repository.refs[name][-1][0]}
                        for name in names
                    ],
                    "converts": [],
                    "tags": [],
                }
            )
        if what == "commits":
            entry = {"title": "", "message": "", "authors": [{"user": owner}], "date": "2026-01-01T00:00:00.000Z"}
            history = [{**entry, "id": oid} for oid, _ in reversed(repository.refs.get(revision, []))]
            return self._json(history)
        found = repository.commit(revision)
        if found is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        oid, files = found
        if what == "preupload":
            return self._preupload()
        if what == "commit":
            if user != owner and "create_pr" not in self.query:
                return self._error(403, "", "Forbidden: you must be the owner, or open a pull request")
            return self._commit(repo_id, repository, revision, files)
        if what == "resolve":
            return self._resolve(oid, files, "/".join(rest[2:]))
        if what == "tree":
            folder = "".join(f"{part}/" for part in rest[2:])
            entries = [_entry(path, content) for path, content in files.items() if path.startswith(folder)]
            if folder and not entries:
                return self._error(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
            return self._json(entries)
        if what == "paths-info":
            wanted = json.loads(self.body)["paths"]
            return self._json([_entry(path, files[path]) for path in wanted if path in files])
        return self._json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": oid,
                "private": repository.private,
                "tags": [],
                "downloads": 0,
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def _preupload(self):
        files = json.loads(self.body)["files"]
        return self._json(
            {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if _is_large(f["path"]) else "regular",
                        "shouldIgnore": False,
                    }
                    for f in files
                ]
            }
        )

    def _lfs_batch(self):
        objects = json.loads(self.body)["objects"]
        answer = []
        for wanted in objects:
            one = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.large_files:
                one["actions"] = {"upload": {"href": f"{self.server.endpoint}/upload/{wanted['oid']}"}}
            answer.append(one)
        return self._json({"transfer": "basic", "objects": answer})

    def _upload(self, oid):
        if self.server.failing_uploads:
            self.server.failing_uploads -= 1
            return self._error(400, "", "The upload broke off")
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "", "The content does not match its hash")
        self.server.large_files[oid] = self.body
        return self._json({})

    def _commit(self, repo_id, repository, revision, files):
        files = dict(files)
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.large_files:
                    return self._error(400, "", f"{value['path']} was never uploaded")
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
        answer = {}
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{repo_id}/discussions/{number}"
        oid = repository.add_commit(revision, files)
        answer |= {"success": True, "commitOid": oid, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{oid}"}
        return self._json(answer)

    def _resolve(self, oid, files, path):
        if path not in files:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": oid})
        content = files[path]
        return self._send(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": oid})

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status, code, message, headers=None):
        self._send(
            status,
            json.dumps({"error": message}).encode(),
            {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json", **(headers or {})},
        )

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".png"))


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if _is_large(path):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
