"""A Hub on the loopback address for huggingface_hub, transformers and Trainer, with failures on request.

It speaks the HTTP interface of the installed huggingface_hub without Xet: create, whoami, preupload, LFS batch, upload
and verify, commit, model info, tree, refs, branches, and resolve with ETags and ranges. Writing requires `TOKEN`.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "t" * 34
LFS = re.compile(r".*\.(safetensors|png|onnx|pt2|bin)$")


@dataclass
class Repository:
    """A repository: `branches` maps names to commits, `commits` maps ids to all files by path."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(f"{branch} {len(self.commits)}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        oid = digest.hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def find(self, revision: str) -> str | None:
        revision = revision.removeprefix("refs/heads/")
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class Failure:
    """A failure, of the given kind, of the next `times` requests whose "METHOD /path" matches `pattern`."""

    pattern: str
    kind: str  # "cut" in the middle of the body, "slow" by a second, or a status: "401", "429", "500"
    times: int = 1


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS objects by sha256
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.find(revision)]

    def handle_error(self, request, client_address):
        """Ignore clients that disconnect."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def __getattr__(self, name):
        if name.startswith("do_"):
            return self.answer_anything
        raise AttributeError(name)

    def answer_anything(self):
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        length = int(self.headers.get("Content-Length") or 0)
        with self.server.lock:
            self.server.requests.append(request)
            failure = next((f for f in self.server.failures if f.times and re.search(f.pattern, request)), None)
            if failure:
                failure.times -= 1
        if failure and failure.kind == "cut":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(length) if length else self.read_chunks()
        if failure and failure.kind == "slow":
            time.sleep(1)
        elif failure:
            headers = {"Retry-After": "1"} if failure.kind == "429" else {}
            self.answer(int(failure.kind), {"error": f"told to answer {failure.kind}"}, headers)
            return
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, request):
                with self.server.lock:
                    method(self, **found.groupdict())
                return
        self.answer(404, {"error": f"no such address: {request}"})

    def read_chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, content, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str, write: bool = False) -> Repository | None:
        """Return a repository, or answer with an error and return `None`."""
        repository = self.server.repositories.get(name)
        if (write or (repository and repository.private)) and not self.may_write:
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif repository is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            return repository
        return None

    def commit_of(self, repository: Repository, revision: str) -> str | None:
        oid = repository.find(revision)
        if oid is None:
            self.answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return oid

    def whoami(self):
        if self.may_write:
            self.answer(200, {"name": "author", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        else:
            self.answer(401, {"error": "Invalid user token."})

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'author'}/{asked['name']}"
        if not self.may_write:
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif name in self.server.repositories:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.server.address}/{name}"})
        else:
            repository = Repository(private=asked.get("visibility") == "private" or bool(asked.get("private")))
            repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.server.repositories[name] = repository
            self.answer(200, {"url": f"{self.server.address}/{name}", "name": name, "id": name})

    def validate(self):
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, name, revision):
        if (repository := self.repository(name, write=True)) is None:
            return
        if (oid := self.commit_of(repository, revision)) is None:
            return
        there = repository.commits[oid]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if LFS.match(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": object_id(file["path"], there[file["path"]]) if file["path"] in there else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, name):
        if self.repository(name, write=True) is None:
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.server.address}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.server.address}/lfs/verify"},
                }
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() == oid:
            self.server.objects[oid] = self.body
            self.answer(200, b"")
        else:
            self.answer(400, {"error": "the content does not match its sha256"})

    def verify(self):
        there = json.loads(self.body)["oid"] in self.server.objects
        self.answer(200 if there else 404, {} if there else {"error": "no such object"})

    def commit(self, name, revision):
        if (repository := self.repository(name, write=True)) is None:
            return
        if (oid := self.commit_of(repository, revision)) is None:
            return
        files = dict(repository.commits[oid])
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    self.answer(400, {"error": f"{value['path']} was not uploaded"})
                    return
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
        oid = repository.commit(revision.removeprefix("refs/heads/"), files)
        self.answer(
            200, {"commitOid": oid, "commitUrl": f"{self.server.address}/{name}/commit/{oid}", "success": True}
        )

    def branch(self, name, branch):
        if (repository := self.repository(name, write=True)) is None:
            return
        if branch in repository.branches:
            self.answer(409, {"error": "Reference already exists"})
            return
        repository.branches[branch] = repository.branches["main"]
        self.answer(200, {})

    def info(self, name, revision="main"):
        if (repository := self.repository(name)) is None:
            return
        if (oid := self.commit_of(repository, revision)) is None:
            return
        siblings = [{"rfilename": path} for path in sorted(repository.commits[oid])]
        content = {"_id": "1", "id": name, "modelId": name, "sha": oid, "private": repository.private}
        self.answer(200, content | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "disabled": False})

    def tree(self, name, revision, folder=None):
        if (repository := self.repository(name)) is None:
            return
        if (oid := self.commit_of(repository, revision)) is None:
            return
        entries = [
            entry_of(path, content)
            for path, content in sorted(repository.commits[oid].items())
            if path.startswith((folder or "").strip("/"))
        ]
        self.answer(200, entries)

    def paths_info(self, name, revision):
        if (repository := self.repository(name)) is None:
            return
        if (oid := self.commit_of(repository, revision)) is None:
            return
        files, asked = repository.commits[oid], json.loads(self.body)["paths"]
        self.answer(200, [entry_of(path, files[path]) for path in asked if path in files])

    def refs(self, name):
        if (repository := self.repository(name)) is None:
            return
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": oid}
            for branch, oid in repository.branches.items()
        ]
        self.answer(200, {"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def resolve(self, name, revision, path):
        if (repository := self.repository(name)) is None:
            return
        if (oid := self.commit_of(repository, revision)) is None:
            return
        headers = {"X-Repo-Commit": oid}
        if path not in repository.commits[oid]:
            self.answer(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
            return
        content = repository.commits[oid][path]
        headers |= {
            "ETag": f'"{object_id(path, content)}"',
            "Accept-Ranges": "bytes",
            "X-Linked-Size": str(len(content)),
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self.answer(200, content, headers)
            return
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        if first >= len(content):
            self.answer(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
        self.answer(206, content[first : last + 1], headers)


def object_id(path: str, content: bytes) -> str:
    """Return the sha256 of a large file, and the git object id of any other."""
    if LFS.match(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def entry_of(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": object_id(path, content)}
    if LFS.match(path):
        entry["lfs"] = {"oid": object_id(path, content), "size": len(content), "pointerSize": 134}
    return entry


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{NAME}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"POST /api/models/{NAME}/commit/(?P<revision>.+)", Handler.commit),
    (rf"POST /api/models/{NAME}/branch/(?P<branch>.+)", Handler.branch),
    (rf"POST /api/models/{NAME}/paths-info/(?P<revision>.+)", Handler.paths_info),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.upload),
    (r"POST /lfs/verify", Handler.verify),
    (rf"GET /api/models/{NAME}/refs", Handler.refs),
    (rf"GET /api/models/{NAME}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", Handler.tree),
    (rf"GET /api/models/{NAME}/revision/(?P<revision>.+)", Handler.info),
    (rf"GET /api/models/{NAME}", Handler.info),
    (rf"(?:GET|HEAD) /{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
