"""A Hub in memory, on loopback, for the real `huggingface_hub` client: repositories with commits, branches, tags, pull
requests and LFS files. One user, one token; nothing is deleted. What the client asks for in
vain is answered by a 404 that names it.

The client reads `HF_ENDPOINT` when it is imported, so it runs in a process of its own, started with
[`LocalHub.environment`].
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_helpers import OTHER_TOKEN

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".parquet")
LFS_SIZE = 10 * 2**20


@dataclass(frozen=True)
class Blob:
    """A file: LFS files are named by the SHA-256 of their bytes, others by git's SHA-1."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def row(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.oid, "size": len(self.data), "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "oid": self.oid, "size": len(self.data), **lfs}


@dataclass
class Commit:
    files: dict[str, Blob]
    title: str
    parent: str | None = None

    @property
    def sha(self) -> str:
        tree = [(path, blob.oid) for path, blob in sorted(self.files.items())]
        return hashlib.sha1(repr((tree, self.title, self.parent)).encode()).hexdigest()


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # such as refs/heads/main -> the SHA of a commit

    def add(self, ref: str, commit: Commit) -> str:
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit.sha

    def sha(self, revision: str) -> str:
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.refs[name]
        if revision not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return revision


class Refusal(Exception):
    """An answer other than 200: the status, the client's error code, a message, and what else the answer holds."""

    def __init__(self, status: int, code: str, message: str, **body: Any):
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body


class LocalHub:
    """`with LocalHub() as hub:` serves on a free port of 127.0.0.1.

    Attributes:
        url: where.
        repositories: `(type, id)` -> [`Repository`], the type `"model"` or `"dataset"`.
        received: bodies of all requests, as they came; `objects` has the LFS uploads by their SHA-256.
        cut_uploads: how many of the next LFS uploads to cut off in their middle.
    """

    user, token = "someone", "hf_localtokenofthetests"

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.received: list[bytes] = []
        self.cut_uploads = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: str) -> dict[str, str]:
        """What a client's process needs; its cache and modules go into `home`."""
        online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        places = {"HF_HOME": home, "HF_MODULES_CACHE": f"{home}/modules"}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token} | online | places

    def files(self, repo: str, revision: str = "main", type: str = "model") -> dict[str, bytes]:
        """Path -> content of a revision."""
        repository = self.repositories[type, repo]
        return {path: blob.data for path, blob in repository.commits[repository.sha(revision)].files.items()}

    def leaks(self, base: Path) -> list[str]:
        """Where in all that was sent here is a token or a path: of the tests' folder `base`, of the repository."""
        sent = {f"request {number}": body for number, body in enumerate(self.received)} | {**self.objects}
        for (_, repo), repository in self.repositories.items():
            for commit in repository.commits.values():
                sent |= {f"{path} of {repo}": blob.data for path, blob in commit.files.items()}
        secrets = [self.token, OTHER_TOKEN, str(base), str(Path(__file__).parent.parent)]
        return [f"{secret}: {place}" for secret in secrets for place, data in sent.items() if secret.encode() in data]


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
REPO = r"/api/(?P<type>model|dataset)s/(?P<repo>[^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable:
    def add(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return add


def wrong_metadata(metadata: dict[str, Any]) -> list[str]:
    """What the Hub refuses in a README: values of another form than its fields have."""

    def texts(value: Any) -> list:
        return value if isinstance(value, list) else [value]

    wrong = []
    for name in ("license", "library_name", "pipeline_tag", "tags", "datasets", "metrics", "base_model"):
        if name in metadata and not all(isinstance(each, str) and each for each in texts(metadata[name])):
            wrong.append(f'"{name}" must be a string or a list of strings')
    for name in ("datasets", "base_model"):
        for each in texts(metadata.get(name, [])):
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(each)):
                wrong.append(f'"{name}" with value "{each}" is not a valid id')
    if metadata.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        wrong.append('"base_model_relation" is none of the four')
    for model in metadata.get("model-index", []):
        for result in model["results"] if model.get("name") else [{}]:
            known = (result.get("task") or {}).get("type"), *map((result.get("dataset") or {}).get, ("type", "name"))
            metrics = result.get("metrics") or [{}]
            if not all(known) or not all(metric.get("type") and "value" in metric for metric in metrics):
                wrong.append('"model-index" needs a name, and of each result task.type, dataset.type and name, metrics')
    return wrong


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            self.body = self._read()
            self.hub.received.append(self.body)
            authorization = self.headers.get("Authorization")
            if authorization not in (None, f"Bearer {self.hub.token}"):
                raise Refusal(401, "", "Invalid credentials in Authorization header")
            self.known = authorization is not None
            wanted = "GET" if self.command == "HEAD" else self.command
            for method, pattern, function in ROUTES:
                if method == wanted and (found := pattern.fullmatch(url.path)):
                    groups = {name: unquote(value) if value else value for name, value in found.groupdict().items()}
                    answer = function(self, **groups)
                    return None if answer is None else self.send(200, json.dumps(answer).encode())
            raise Refusal(404, "", f"no such route: {self.command} {url.path}")
        except Refusal as error:
            body = json.dumps({"error": error.message, **error.body}).encode()
            self.send(error.status, body, {"X-Error-Code": error.code, "X-Error-Message": error.message})
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _read(self) -> bytes:
        if self.command == "PUT" and self.hub.cut_uploads:
            self.hub.cut_uploads -= 1
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            raise ConnectionError("cut off")
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, body: bytes, headers: dict[str, Any] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def repository(self, type: str | None, repo: str, write: bool = False) -> Repository:
        found = self.hub.repositories.get((type or "model", repo))
        if found is None or (found.private and not self.known):
            raise Refusal(404 if self.known else 401, "RepoNotFound", "Repository not found")
        if write and not self.known:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return found

    @route("POST", "/api/repos/create")
    def create(self) -> dict:
        if not self.known:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        asked = self.json()
        repo, type = f"{asked.get('organization') or self.hub.user}/{asked['name']}", asked.get("type") or "model"
        url = f"{self.hub.url}/{'datasets/' if type == 'dataset' else ''}{repo}"
        if (type, repo) in self.hub.repositories:
            raise Refusal(409, "", "You already created this repository", url=url)
        repository = Repository(private=bool(asked.get("private") or asked.get("visibility") == "private"))
        repository.add("refs/heads/main", Commit({".gitattributes": Blob(b"", lfs=False)}, "initial commit"))
        self.hub.repositories[type, repo] = repository
        return {"url": url, "name": repo}

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> dict:
        if not self.known:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return {"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    @route("POST", "/api/validate-yaml")
    def validate(self) -> dict:
        found = re.match(r"---\r?\n(.*?)\r?\n---", self.json()["content"], re.DOTALL)
        try:
            wrong = wrong_metadata(yaml.safe_load(found[1] if found else "") or {})
        except yaml.YAMLError as error:
            wrong = [str(error)]
        if wrong:
            errors = [{"message": message} for message in wrong]
            raise Refusal(400, "", "Invalid metadata", errors=errors, warnings=[])
        return {"errors": [], "warnings": []}

    @route("POST", REPO + "/preupload/(?P<revision>[^/]+)")
    def preupload(self, type: str, repo: str, revision: str) -> dict:
        repository = self.repository(type, repo, write=True)
        files = repository.commits[repository.sha(revision)].files
        answers = []
        for file in self.json()["files"]:
            path = file["path"]
            lfs = path.endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            oid = files[path].oid if path in files else None
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    @route("POST", r"/(?:(?P<type>dataset)s/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def batch(self, type: str | None, repo: str) -> dict:
        self.repository(type, repo, write=True)
        answers = []
        for each in self.json()["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            answers.append(each | ({} if each["oid"] in self.hub.objects else {"actions": upload}))
        return {"transfer": "basic", "objects": answers}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def upload(self, oid: str) -> dict:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "the bytes are not those announced")
        self.hub.objects[oid] = self.body
        return {}

    @route("POST", REPO + "/commit/(?P<revision>[^/]+)")
    def commit(self, type: str, repo: str, revision: str) -> dict:
        repository = self.repository(type, repo, write=True)
        parent = repository.sha(revision)
        header = next(entry["value"] for entry in map(json.loads, self.body.splitlines()) if entry["key"] == "header")
        if header.get("parentCommit") not in (None, parent):
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files, title = dict(repository.commits[parent].files), ""
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, "", f"{key}: not known to this Hub")
        ref, answer = f"refs/heads/{revision}", {}
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            ref, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}"}
        elif revision in repository.refs:
            ref = revision
        sha = repository.add(ref, Commit(files, title, parent))
        return {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, **answer}

    @route("GET", REPO + "(?:/revision/(?P<revision>[^/]+))?")
    def info(self, type: str, repo: str, revision: str | None) -> dict:
        repository = self.repository(type, repo)
        sha = repository.sha(revision or "main")
        siblings = [{"rfilename": path} for path in repository.commits[sha].files]
        return {"id": repo, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings}

    @route("GET", REPO + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, type: str, repo: str, revision: str, folder: str | None) -> list:
        repository = self.repository(type, repo)
        prefix = f"{folder}/" if folder else ""
        files = repository.commits[repository.sha(revision)].files
        rows = {}
        for path, blob in files.items():
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                for depth in range(1, len(parts)):
                    parent = prefix + "/".join(parts[:depth])
                    rows[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
                rows[path] = blob.row(path)
        if folder and not rows:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        return [row for path, row in rows.items() if deep or "/" not in path.removeprefix(prefix)]

    @route("POST", REPO + "/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, type: str, repo: str, revision: str) -> list:
        asked = self.json()["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())["paths"]
        self.query["recursive"] = ["true"]
        return [row for row in self.tree(type, repo, revision, None) if row["path"] in asked]

    @route("GET", REPO + "/refs")
    def refs(self, type: str, repo: str) -> dict:
        answer: dict[str, list] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        kinds = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        for ref, sha in self.repository(type, repo).refs.items():
            prefix = next(prefix for prefix in kinds if ref.startswith(prefix))
            answer[kinds[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha})
        return answer

    @route("GET", REPO + "/commits/(?P<revision>[^/]+)")
    def commits(self, type: str, repo: str, revision: str) -> list:
        repository, rows = self.repository(type, repo), []
        sha: str | None = repository.sha(revision)
        while sha:
            row = {"id": sha, "title": (commit := repository.commits[sha]).title, "message": "", "authors": []}
            rows.append(row | {"date": "2000-01-01T00:00:00.000Z"})
            sha = commit.parent
        return rows

    @route("POST", REPO + "/(?P<kind>branch|tag)/(?P<name>[^/]+)")
    def create_ref(self, type: str, repo: str, kind: str, name: str) -> dict:
        repository, asked = self.repository(type, repo, write=True), self.json()
        # a branch is named in the address, a tag in the body, beside the revision in the address
        ref = f"refs/heads/{name}" if kind == "branch" else f"refs/tags/{asked['tag']}"
        if ref in repository.refs:
            raise Refusal(409, "", f"Reference {ref} already exists")
        repository.refs[ref] = repository.sha(asked.get("startingPoint", "main") if kind == "branch" else name)
        return {}

    @route("GET", "/(?:(?P<type>dataset)s/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, type: str | None, repo: str, revision: str, path: str) -> None:
        repository = self.repository(type, repo)
        sha = repository.sha(revision)
        blob = repository.commits[sha].files.get(path)
        if blob is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Content-Type": "application/octet-stream"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": len(blob.data)}
        self.send(200, blob.data, headers)
