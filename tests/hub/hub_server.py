"""A Hub for tests: real sockets, the standard library, as much of the HTTP surface as huggingface_hub 2.4 uses.

Two servers on two ports: the Hub, and the storage of large files, since the client keeps what a redirect's headers say
only if it leads to another origin. Every byte that comes in is kept, and every answer can be made to fail: see
`TestHub.fail`.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

ALWAYS = 10**9
LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf", ".onnx", ".pt", ".pkl")  # of the Hub's own .gitattributes
LARGE_SIZE = 10 * 2**20
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES).encode()
DATE = "2026-01-01T00:00:00.000Z"
HEX_COMMIT = re.compile(r"[0-9a-f]{40}")


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE_SUFFIXES) or size > LARGE_SIZE


@dataclass(frozen=True)
class Large:
    """What git keeps of a large file."""

    sha256: str
    size: int

    @property
    def pointer(self) -> bytes:
        """The text in git's tree."""
        spec = "version https://git-lfs.github.com/spec/v1"
        return f"{spec}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    title: str
    files: dict[str, bytes | Large]
    parents: tuple["Commit", ...] = ()


@dataclass
class Repo:
    """A repository: branches, tags and pull requests by the name of their ref."""

    private: bool
    refs: dict[str, Commit] = field(default_factory=dict)

    def add(self, ref: str, title: str, files: dict[str, bytes | Large], parent: Commit | None) -> Commit:
        """Make a commit, and let a ref point to it."""
        told = repr((title, sorted((path, str(content)) for path, content in files.items()), parent and parent.oid))
        oid = hashlib.sha1(told.encode()).hexdigest()
        self.refs[ref] = Commit(oid, title, files, (parent,) if parent else ())
        return self.refs[ref]

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, tag, ref or hash."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.refs[ref]
        return next((commit for commit in self.commits() if commit.oid == revision), None)

    def commits(self) -> list[Commit]:
        """Every commit that a ref leads to."""
        found: dict[str, Commit] = {}
        for commit in self.refs.values():
            for one in history(commit):
                found[one.oid] = one
        return list(found.values())


def history(commit: Commit) -> list[Commit]:
    """A commit and those before it, newest first."""
    return [commit, *(older for parent in commit.parents for older in history(parent))]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests to an endpoint, in one repository or in all."""

    endpoint: str
    kind: str
    times: int
    repo: str | None
    value: float


@dataclass(frozen=True)
class Seen:
    """A request as it came in; the names of headers in lower case."""

    endpoint: str
    repo: str | None
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    fault: str | None


class TestHub:
    """The Hub's state and its two servers; a context manager.

    Args:
        tokens: token -> names of the user and of the organisations that may be written to with it.
        part_size: bytes of one part of a large file that is sent in parts; None sends all files whole.
    """

    __test__ = False  # to pytest, which collects classes by this name

    def __init__(self, tokens: dict[str, list[str]], part_size: int | None = None) -> None:
        self.tokens, self.part_size = tokens, part_size
        self.repos: dict[str, Repo] = {}
        self.objects: dict[tuple[str, str], bytes] = {}  # by repository and SHA-256
        self.parts: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.before: Callable[[Seen], None] = lambda seen: None
        self.lock = threading.RLock()

    def __enter__(self) -> "TestHub":
        handlers = [type(name, (Handler,), {"hub": self}) for name in ("HubHandler", "StorageHandler")]
        self.servers = [Server(("127.0.0.1", 0), handler) for handler in handlers]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fail(self, endpoint: str, kind: str, times: int = 1, repo: str | None = None, value: float = 0) -> None:
        """Make requests fail.

        Args:
            endpoint: its name in `route`.
            kind: `status` (answers with `value`), `limit` (429 that asks to wait `value` seconds), `drop` (hangs up
                before anything is done), `lose` (does it and hangs up without an answer), `stall` (waits `value`
                seconds first), `truncate` (hangs up in the middle of the body), `shorten` (sends half of the body as if
                it were all), `flip` (flips one bit of the body).
            times: of the next requests, `ALWAYS` of all.
            repo: only there.
            value: see `kind`.
        """
        self.faults.append(Fault(endpoint, kind, times, repo, value))

    def take_fault(self, endpoint: str, repo: str | None) -> Fault | None:
        """The fault that is due, counted off."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.endpoint == endpoint and fault.repo in (None, repo):
                    fault.times -= 1
                    return fault
        return None

    def requests(self, endpoint: str, repo: str | None = None) -> list[Seen]:
        """What came to an endpoint."""
        return [seen for seen in self.seen if seen.endpoint == endpoint and repo in (None, seen.repo)]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content of what a repository holds."""
        commit = self.repos[repo].find(revision)
        assert commit is not None
        return {
            path: self.objects[repo, content.sha256] if isinstance(content, Large) else content
            for path, content in commit.files.items()
        }

    def titles(self, repo: str, revision: str = "main") -> list[str]:
        """The titles of a repository's commits, newest first."""
        commit = self.repos[repo].find(revision)
        assert commit is not None
        return [older.title for older in history(commit)]

    def put(self, repo: str, title: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Commit as somebody else would; returns the commit."""
        with self.lock:
            target = self.repos.setdefault(repo, Repo(private=False))
            parent = target.find(revision)
            tree: dict[str, bytes | Large] = dict(parent.files) if parent else {".gitattributes": GIT_ATTRIBUTES}
            for path, content in files.items():
                tree[path] = content
                if is_large(path, len(content)):
                    tree[path] = large = Large(hashlib.sha256(content).hexdigest(), len(content))
                    self.objects[repo, large.sha256] = content
            return target.add(f"refs/heads/{revision}", title, tree, parent).oid


class Server(ThreadingHTTPServer):
    """Forgets requests that are still running when it ends, and says nothing of connections that break."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: breaking off is what the tests do."""


@dataclass
class Answer:
    """What to send back."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(content: object, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def error(status: int, message: str, code: str | None = None) -> Answer:
    answer = as_json({"error": message}, status)
    answer.headers["X-Error-Message"] = message
    if code is not None:
        answer.headers["X-Error-Code"] = code
    return answer


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", "whoami", r"/api/whoami-v2"),
    ("POST", "create", r"/api/repos/create"),
    ("POST", "validate-yaml", r"/api/validate-yaml"),
    ("POST", "preupload", rf"/api/(?:models|datasets)/{REPO}/preupload/(?P<revision>[^/]+)"),
    ("POST", "commit", rf"/api/(?:models|datasets)/{REPO}/commit/(?P<revision>[^/]+)"),
    ("GET", "refs", rf"/api/(?:models|datasets)/{REPO}/refs"),
    ("GET", "commits", rf"/api/(?:models|datasets)/{REPO}/commits/(?P<revision>[^/]+)"),
    ("GET", "tree", rf"/api/(?:models|datasets)/{REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?"),
    ("POST", "paths-info", rf"/api/(?:models|datasets)/{REPO}/paths-info/(?P<revision>[^/]+)"),
    ("POST", "branch", rf"/api/(?:models|datasets)/{REPO}/branch/(?P<branch>[^/]+)"),
    ("POST", "tag", rf"/api/(?:models|datasets)/{REPO}/tag/(?P<revision>[^/]+)"),
    ("GET", "info", rf"/api/(?:models|datasets)/{REPO}(/revision/(?P<revision>[^/]+))?"),
    ("POST", "lfs-batch", rf"/{REPO}\.git/info/lfs/objects/batch"),
    ("POST", "lfs-verify", rf"/{REPO}\.git/info/lfs/verify"),
    ("POST", "lfs-complete", rf"/{REPO}\.git/info/lfs/complete/(?P<oid>\w+)"),
    ("HEAD", "head", rf"/(?:datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("GET", "get", rf"/(?:datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("PUT", "lfs-put", rf"/storage/{REPO}/(?P<oid>\w+)(/(?P<part>\d+))?"),
    ("GET", "storage-get", rf"/storage/{REPO}/(?P<oid>\w+)"),
]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: TestHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing; `TestHub.seen` has it all."""

    def handle_any(self) -> None:
        """Answer one request, or fail as it was asked for."""
        url = urlparse(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        body = self.read_body()
        endpoint, match = "none", None
        for method, name, pattern in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and method == self.command:
                endpoint = name
                break
        words = {key: unquote(value) for key, value in match.groupdict().items() if value} if match else {}
        repo = words.pop("repo", None)
        fault_repo = repo or self.named_in(body)
        fault = self.hub.take_fault(endpoint, fault_repo)
        seen = Seen(
            endpoint,
            fault_repo,
            self.command,
            self.path,
            {name.lower(): value for name, value in self.headers.items()},
            body,
            fault and fault.kind,
        )
        with self.hub.lock:
            self.hub.seen.append(seen)
        self.hub.before(seen)
        if fault and fault.kind == "drop":
            self.close_connection = True
            return
        if fault and fault.kind == "stall":
            time.sleep(fault.value)
        if fault and fault.kind in ("status", "limit"):
            answer = error(int(fault.value) if fault.kind == "status" else 429, "made to fail")
            if fault.kind == "limit":
                answer.headers["Retry-After"] = str(int(fault.value))
        elif endpoint == "none":
            answer = error(404, f"the test Hub does not know {self.command} {url.path}")
        else:
            with self.hub.lock:
                answer = getattr(self, "on_" + endpoint.replace("-", "_"))(repo, body, **words)
        if fault and fault.kind == "lose":
            self.close_connection = True
            return
        self.send(answer, fault.kind if fault else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self) -> bytes:
        """The whole body, in chunks or not."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, answer: Answer, fault: str | None = None) -> None:
        """Write an answer, the damage of its body included."""
        body = answer.body
        if fault == "flip":
            damaged = bytearray(body)
            damaged[len(damaged) // 2] ^= 1
            body = bytes(damaged)
        if fault == "shorten":
            body = body[: len(body) // 2]
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "truncate":
            body = body[: len(body) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body)

    def named_in(self, body: bytes) -> str | None:
        """The repository that a request is about whose address names none."""
        content = json.loads(body) if body.startswith(b"{") else {}
        if "name" in content:
            return f"{content.get('organization')}/{content['name']}"
        found = re.search(r"# (\w+/[\w-]+)\n", str(content.get("content")))
        return found[1] if found else None

    # Who may do what.

    def names(self) -> list[str]:
        """The names that the request's token may write for."""
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "), [])

    def refuse(self, repo: str, to_write: bool = False) -> Answer | None:
        """Why this token may not see, or write to, a repository; None if it may."""
        if "Authorization" in self.headers and not self.names():
            return error(401, "Invalid credentials in Authorization header")
        may_write = repo.partition("/")[0] in self.names()
        if repo not in self.hub.repos or (self.hub.repos[repo].private and not may_write):
            return error(401 if not self.names() else 404, "Repository not found", "RepoNotFound")
        if to_write and not may_write:
            return error(403, f"You don't have the rights to write to {repo}")
        return None

    def find(self, repo: str, revision: str) -> Commit | Answer:
        refusal = self.refuse(repo)
        if refusal:
            return refusal
        commit = self.hub.repos[repo].find(revision)
        return commit or error(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    # One method for each endpoint.

    def on_whoami(self, repo: None, body: bytes) -> Answer:
        if not self.names():
            return error(401, "Invalid credentials in Authorization header")
        name, *organisations = self.names()
        access = {"displayName": "test", "role": "write"}
        orgs = [{"name": organisation} for organisation in organisations]
        auth = {"type": "access_token", "accessToken": access}
        return as_json({"type": "user", "name": name, "fullname": name, "orgs": orgs, "auth": auth})

    def on_create(self, repo: None, body: bytes) -> Answer:
        wanted = json.loads(body)
        if not self.names():
            return error(401, "Invalid credentials in Authorization header")
        owner = wanted.get("organization") or self.names()[0]
        name = f"{owner}/{wanted['name']}"
        if owner not in self.names():
            return error(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if name in self.hub.repos:
            answer = as_json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return answer
        new = Repo(private=wanted.get("visibility") == "private")
        new.add("refs/heads/main", "initial commit", {".gitattributes": GIT_ATTRIBUTES}, None)
        self.hub.repos[name] = new
        return as_json({"url": f"{self.hub.url}/{name}"})

    def on_validate_yaml(self, repo: None, body: bytes) -> Answer:
        return as_json({"errors": [], "warnings": []})

    def on_info(self, repo: str, body: bytes, revision: str = "main") -> Answer:
        commit = self.find(repo, revision)
        if isinstance(commit, Answer):
            return commit
        siblings = []
        for path, content in commit.files.items():
            sibling: dict[str, object] = {"rfilename": path}
            if "blobs" in self.query:
                sibling |= {"size": size_of(content), "blobId": blob_of(content)}
                if isinstance(content, Large):
                    pointer = {"sha256": content.sha256, "size": content.size, "pointerSize": len(content.pointer)}
                    sibling["lfs"] = pointer
            siblings.append(sibling)
        info = {"id": repo, "sha": commit.oid, "private": self.hub.repos[repo].private, "tags": []}
        return as_json({**info, "siblings": siblings, "lastModified": DATE, "createdAt": DATE})

    def on_refs(self, repo: str, body: bytes) -> Answer:
        refusal = self.refuse(repo)
        if refusal:
            return refusal
        kinds = {
            "branches": "refs/heads/",
            "tags": "refs/tags/",
            "pullRequests": "refs/pr/",
            "converts": "refs/convert/",
        }
        return as_json(
            {
                kind: [
                    {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit.oid}
                    for ref, commit in self.hub.repos[repo].refs.items()
                    if ref.startswith(prefix)
                ]
                for kind, prefix in kinds.items()
                if kind != "pullRequests" or "include_prs" in self.query
            }
        )

    def on_commits(self, repo: str, body: bytes, revision: str) -> Answer:
        commit = self.find(repo, revision)
        if isinstance(commit, Answer):
            return commit
        return as_json(
            [
                {"id": one.oid, "title": one.title, "message": "", "date": DATE, "authors": [{"user": "somebody"}]}
                for one in history(commit)
            ]
        )

    def on_tree(self, repo: str, body: bytes, revision: str, path: str = "") -> Answer:
        commit = self.find(repo, revision)
        if isinstance(commit, Answer):
            return commit
        inside = f"{path}/" if path else ""
        found = [entry(name, content) for name, content in commit.files.items() if name.startswith(inside)]
        return as_json(found) if found else error(404, f"{path} does not exist", "EntryNotFound")

    def on_paths_info(self, repo: str, body: bytes, revision: str) -> Answer:
        commit = self.find(repo, revision)
        if isinstance(commit, Answer):
            return commit
        paths = parse_qs(body.decode())["paths"]
        return as_json([entry(name, content) for name, content in commit.files.items() if name in paths])

    def on_branch(self, repo: str, body: bytes, branch: str) -> Answer:
        refusal = self.refuse(repo, to_write=True)
        if refusal:
            return refusal
        start = self.find(repo, json.loads(body or b"{}").get("startingPoint", "main"))
        if isinstance(start, Answer):
            return start
        if f"refs/heads/{branch}" in self.hub.repos[repo].refs:
            return error(409, f"Reference already exists: refs/heads/{branch}")
        self.hub.repos[repo].refs[f"refs/heads/{branch}"] = start
        return as_json({})

    def on_tag(self, repo: str, body: bytes, revision: str) -> Answer:
        refusal = self.refuse(repo, to_write=True)
        if refusal:
            return refusal
        commit, tag = self.find(repo, revision), json.loads(body)["tag"]
        if isinstance(commit, Answer):
            return commit
        if f"refs/tags/{tag}" in self.hub.repos[repo].refs:
            return error(409, f"Tag already exists: {tag}")
        self.hub.repos[repo].refs[f"refs/tags/{tag}"] = commit
        return as_json({})

    def on_preupload(self, repo: str, body: bytes, revision: str) -> Answer:
        refusal = self.refuse(repo, to_write="create_pr" not in self.query)
        if refusal:
            return refusal
        commit = self.find(repo, revision)
        if isinstance(commit, Answer):
            return commit
        files = []
        for file in json.loads(body)["files"]:
            large = is_large(file["path"], file["size"])
            told = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            there = commit.files.get(file["path"])
            if there is not None:
                told["oid"] = there.sha256 if isinstance(there, Large) else git_sha1(there)
            files.append(told)
        return as_json({"files": files})

    def on_lfs_batch(self, repo: str, body: bytes) -> Answer:
        refusal = self.refuse(repo)
        if refusal:
            return refusal
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            told: dict[str, object] = {"oid": oid, "size": size}
            if (repo, oid) not in self.hub.objects:
                upload: dict[str, object] = {"href": f"{self.hub.storage_url}/storage/{repo}/{oid}"}
                if self.hub.part_size is not None and size > self.hub.part_size:
                    numbers = range(1, -(-size // self.hub.part_size) + 1)
                    upload["header"] = {"chunk_size": str(self.hub.part_size)} | {
                        f"{number:05d}": f"{self.hub.storage_url}/storage/{repo}/{oid}/{number}" for number in numbers
                    }
                    upload["href"] = f"{self.hub.url}/{repo}.git/info/lfs/complete/{oid}"
                verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}
                told["actions"] = {"upload": upload, "verify": verify}
            objects.append(told)
        return as_json({"transfer": "basic", "objects": objects})

    def on_lfs_put(self, repo: str, body: bytes, oid: str, part: str | None = None) -> Answer:
        if part is not None:
            self.hub.parts[f"{repo}/{oid}/{part}"] = body
            return Answer(headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        return self.store(repo, oid, body)

    def on_lfs_complete(self, repo: str, body: bytes, oid: str) -> Answer:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        return self.store(repo, oid, b"".join(self.hub.parts.pop(f"{repo}/{oid}/{number}") for number in numbers))

    def store(self, repo: str, oid: str, content: bytes) -> Answer:
        if hashlib.sha256(content).hexdigest() != oid:
            return error(400, f"this is not {oid}")
        self.hub.objects[repo, oid] = content
        return Answer()

    def on_lfs_verify(self, repo: str, body: bytes) -> Answer:
        return Answer() if (repo, json.loads(body)["oid"]) in self.hub.objects else error(404, "no such object")

    def on_commit(self, repo: str, body: bytes, revision: str) -> Answer:
        creates_pr = "create_pr" in self.query
        refusal = self.refuse(repo, to_write=not creates_pr)
        if refusal:
            return refusal
        head = self.find(repo, revision)
        if isinstance(head, Answer):
            return head
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head.oid) and not creates_pr:
            return error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if (repo, value["oid"]) not in self.hub.objects:
                    return error(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = Large(value["oid"], value["size"])
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    return error(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
            else:
                return error(400, f"the test Hub does not know {line['key']}")
        target = self.hub.repos[repo]
        known = f"refs/heads/{revision}"
        ref, told = known if known in target.refs else revision, {}
        if creates_pr:
            number = 1 + sum(name.startswith("refs/pr/") for name in target.refs)
            ref, told = f"refs/pr/{number}", {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}"}
        elif HEX_COMMIT.fullmatch(revision):
            return error(400, f"{revision} is no branch")
        commit = target.add(ref, header["summary"], files, head)
        return as_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit.oid}", "commitOid": commit.oid, **told})

    def on_head(self, repo: str, body: bytes, revision: str, path: str) -> Answer:
        commit = self.find(repo, revision)
        if isinstance(commit, Answer):
            return commit
        content = commit.files.get(path)
        if content is None:
            answer = error(404, f"{path} is not in {repo}", "EntryNotFound")
            answer.headers["X-Repo-Commit"] = commit.oid
            return answer
        if isinstance(content, Large):
            headers = {
                "X-Repo-Commit": commit.oid,
                "X-Linked-Etag": f'"{content.sha256}"',
                "X-Linked-Size": str(content.size),
                "Location": f"{self.hub.storage_url}/storage/{repo}/{content.sha256}",
            }
            return Answer(302, headers=headers)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{git_sha1(content)}"', "Content-Length": str(len(content))}
        return Answer(200, content, headers)

    def on_get(self, repo: str, body: bytes, revision: str, path: str) -> Answer:
        answer = self.on_head(repo, body, revision, path)
        answer.headers.pop("Content-Length", None)
        return answer

    def on_storage_get(self, repo: str, body: bytes, oid: str) -> Answer:
        content = self.hub.objects.get((repo, oid))
        if content is None:
            return error(404, "no such object")
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if first is None:
            return Answer(200, content)
        start = int(first[1])
        return Answer(206, content[start:], {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"})


def size_of(content: bytes | Large) -> int:
    return content.size if isinstance(content, Large) else len(content)


def blob_of(content: bytes | Large) -> str:
    return git_sha1(content.pointer if isinstance(content, Large) else content)


def entry(path: str, content: bytes | Large) -> dict[str, object]:
    """A file as `tree` and `paths-info` describe it."""
    told: dict[str, object] = {"type": "file", "path": path, "size": size_of(content), "oid": blob_of(content)}
    if isinstance(content, Large):
        told["lfs"] = {"oid": content.sha256, "size": content.size, "pointerSize": len(content.pointer)}
    return told
