/**
 * Tests of server.ts and index.html, for `deno test -A` and `bun test` alike. Each runtime tests
 * the server as it runs there, over real sockets on free ports.
 *
 * Contents: servers and clients for the tests; HTTP; the handshake; selecting a subprotocol; the
 * subprotocols; reversing; messages; the console; options; TLS; limits and backpressure; subprotocols
 * that fail; hostile clients; the end; the page, in Chromium; the README; the benchmark.
 */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { type ChildProcess, execFileSync, spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { once } from "node:events";
import {
  appendFileSync,
  cpSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { connect as connectHttp2 } from "node:http2";
import { connect as connectTcp, createServer, type Socket } from "node:net";
import { networkInterfaces, tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import type { Readable } from "node:stream";
import { afterEach, describe, it } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { connect as connectTls } from "node:tls";
import {
  limits,
  type Message,
  type Options,
  reverse,
  serve,
  type Server,
  type Subprotocol,
  subprotocols,
} from "./server.ts";

const NAME = "dumb-increment-protocol";
const here = import.meta.dirname!;
const onDeno = "Deno" in globalThis;
const page = readFileSync(join(here, "index.html"), "utf8");

// What a test starts is ended after it, the last one first.
const cleanups: (() => unknown)[] = [];

afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

/** A test of at most 30 s; without a limit Bun gives up after 5 s, Deno never. */
function test(name: string, run: () => Promise<void> | void, skip: string | false = false): void {
  it(name, { timeout: 30_000, skip }, run);
}

/** Locally, a test whose tool is missing is skipped; on CI it fails. */
function without(tool: string, found: boolean): string | false {
  return !found && !process.env.CI && `${tool} is missing`;
}

// ---- Servers ------------------------------------------------------------------------------------

/** Starts a server in this process, until the end of the test. */
function listen(options: Options = {}): number {
  return startServer(options).port;
}

/** The same, for tests that stop the server themselves. */
function startServer(options: Options = {}): Server {
  const server = serve({ port: 0, hostname: "127.0.0.1", quiet: true, ...options });
  cleanups.push(server.stop);
  return server;
}

/** Starts a server that speaks one more subprotocol, "added". */
function listenWith(added: Subprotocol, options: Options = {}): number {
  return listen({ ...options, subprotocols: { ...subprotocols, added } });
}

/** Accepts TCP connections and never answers. */
async function listenSilently(): Promise<number> {
  const server = createServer(() => {});
  cleanups.push(() => server.close());
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return (server.address() as { port: number }).port;
}

/** A proxy that serves another port under a path, and gives its own port. */
async function listenUnderPath(path: string, port: number): Promise<number> {
  const proxy = createServer((client) => {
    const upstream = connectTcp(port, "127.0.0.1");
    const rewrite = (data: Buffer) => data.toString("latin1").replace(`GET ${path}`, "GET /");
    client.on("data", (data) => upstream.write(rewrite(data), "latin1"));
    upstream.pipe(client);
    for (const socket of [client, upstream]) socket.on("error", () => {});
    cleanups.push(() => (client.destroy(), upstream.destroy()));
  });
  cleanups.push(() => proxy.close());
  await new Promise<void>((resolve) => proxy.listen(0, "127.0.0.1", resolve));
  return (proxy.address() as { port: number }).port;
}

/** A server, or another program, that a test has started. */
class Program {
  out = "";
  err = "";
  readonly child: ChildProcess;
  readonly #stdout: Readable;
  readonly #end: Promise<number | null>;

  constructor(command: string, args: string[], env: Record<string, string> = {}) {
    this.child = spawn(command, args, {
      cwd: here,
      env: { ...process.env, NO_COLOR: "1", ...env },
    });
    this.#stdout = this.child.stdout!.on("data", (data) => this.out += data);
    this.child.stderr!.on("data", (data) => this.err += data);
    this.#end = new Promise((resolve) => this.child.on("close", resolve));
    cleanups.push(() => (this.child.kill("SIGKILL"), this.#end));
  }

  /** Waits for the words that say where it listens, and gives the port. */
  async port(): Promise<number> {
    return Number((await this.prints(/^Listening on https?:\/\/[^/]*:(\d+)\/$/m))[1]);
  }

  /** Waits until it has printed a match. */
  async prints(pattern: RegExp): Promise<RegExpMatchArray> {
    const found = await until(this.#stdout, () => this.out.match(pattern) ?? undefined);
    return found ?? assert.fail(`${pattern} not in: ${this.out}${this.err}`);
  }

  /** Waits until it has printed a match to stderr. */
  async reports(pattern: RegExp): Promise<void> {
    await until(this.child.stderr!, () => pattern.test(this.err) || undefined);
    assert.match(this.err, pattern);
  }

  /** Not `child.kill`: on Deno the exit status would not be seen then. */
  signal(name: "SIGINT" | "SIGTERM"): void {
    process.kill(this.child.pid!, name);
  }

  /** Waits for its end and gives its exit status. */
  exitStatus(): Promise<number | null> {
    return this.#end;
  }
}

const denoArgs = ["run", "--no-prompt", "--allow-net", "--allow-read", "--allow-env=PORT"];
const runtimeArgs = onDeno ? denoArgs : [];

function startProgram(
  args: string[],
  env?: Record<string, string>,
  file = join(here, "server.ts"),
) {
  return new Program(process.execPath, [...runtimeArgs, file, ...args], env);
}

/** Starts a copy of server.ts with lines added to it, as somebody makes it their own. */
function startEdited(lines: string, args: string[] = []): Program {
  const folder = temporaryFolder();
  for (const file of ["server.ts", "index.html", "deno.json"]) {
    cpSync(join(here, file), join(folder, file));
  }
  appendFileSync(join(folder, "server.ts"), lines);
  return startProgram(["--port", "0", ...args], {}, join(folder, "server.ts"));
}

function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), "server-test-"));
  cleanups.push(() => rmSync(folder, { recursive: true }));
  return folder;
}

/** The options for a new certificate. */
function certificate(): string[] {
  const folder = temporaryFolder(), cert = join(folder, "cert.pem"), key = join(folder, "key.pem");
  const how = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
  const args = [...how.split(" "), "-subj", "/CN=localhost", "-keyout", key, "-out", cert];
  execFileSync("openssl", args, { stdio: "ignore" });
  return ["--cert", cert, "--key", key];
}

const withoutOpenssl = without("openssl", spawnSync("openssl", ["version"]).status === 0);

// ---- Clients ------------------------------------------------------------------------------------

/** Looks again with each event of a stream until something is found, or until its end. */
function until<T>(stream: Readable, find: () => T | undefined): Promise<T | undefined> {
  return new Promise((resolve) => {
    const look = () => {
      const found = find();
      if (found === undefined && !stream.destroyed) return;
      stream.off("data", look).off("close", look);
      resolve(found);
    };
    stream.on("data", look).on("close", look);
    look();
  });
}

type HttpResponse = { status: number; body: string; header(name: string): string[] };
type Frame = { fin: boolean; opcode: number; data: Buffer };

const CONTINUATION = 0, TEXT = 1, BINARY = 2, CLOSE = 8, PING = 9, PONG = 10;

/** A client that hides nothing: text and frames go out and come in as they are. */
class Raw {
  #bytes = Buffer.alloc(0);

  constructor(readonly socket: Socket) {
    cleanups.push(() => socket.destroy());
    socket.on("data", (chunk) => this.#bytes = Buffer.concat([this.#bytes, chunk]));
    socket.on("error", () => {}); // a reset is an end, too
  }

  static to(port: number): Raw {
    return new Raw(connectTcp(port, "127.0.0.1"));
  }

  /** Connects as a WebSocket client. */
  static async open(port: number, name = NAME): Promise<Raw> {
    const raw = Raw.to(port);
    raw.socket.write(handshake({ "Sec-WebSocket-Protocol": name }));
    assert.equal((await raw.nextResponse())?.status, 101);
    return raw;
  }

  /** The next response; undefined at the end of the connection. */
  nextResponse(method = "GET"): Promise<HttpResponse | undefined> {
    return until(this.socket, () => {
      const end = this.#bytes.indexOf("\r\n\r\n") + 4;
      if (end < 4) return;
      const head = this.#bytes.toString("latin1", 0, end);
      const header = (name: string) =>
        [...head.matchAll(new RegExp(`^${name}: *(.*)\r`, "gim"))].map((match) => match[1]);
      const length = method === "HEAD" ? 0 : Number(header("content-length")[0] ?? 0);
      if (this.#bytes.length < end + length) return;
      const body = this.#bytes.toString("utf8", end, end + length);
      this.#bytes = this.#bytes.subarray(end + length);
      return { status: Number(head.slice(9, 12)), body, header };
    });
  }

  /** The next frame; undefined at the end of the connection. */
  nextFrame(): Promise<Frame | undefined> {
    return until(this.socket, () => this.#takeFrame());
  }

  #takeFrame(): Frame | undefined {
    const bytes = this.#bytes, size = bytes[1];
    const start = size === 127 ? 10 : size === 126 ? 4 : 2;
    if (bytes.length < start) return;
    const end = start +
      (start === 2 ? size : start === 4 ? bytes.readUInt16BE(2) : bytes.readUInt32BE(6));
    if (bytes.length < end) return;
    this.#bytes = bytes.subarray(end);
    return { fin: bytes[0] >= 128, opcode: bytes[0] & 15, data: bytes.subarray(start, end) };
  }

  /** Sends a message and gives the reply: a text, or the bytes in hexadecimal. */
  async ask(message: string | Uint8Array): Promise<string | undefined> {
    this.socket.write(encodeFrame(typeof message === "string" ? TEXT : BINARY, message));
    const reply = await this.nextFrame();
    return reply && reply.data.toString(reply.opcode === TEXT ? "utf8" : "hex");
  }

  /** Reads to the end of the connection: code and reason of the close frame, or "cut". */
  async closeReason(): Promise<string> {
    const close = await until(this.socket, () => {
      for (let frame; (frame = this.#takeFrame());) if (frame.opcode === CLOSE) return frame.data;
    });
    return close ? `${close.readUInt16BE()} ${close.toString("utf8", 2)}` : "cut";
  }
}

/** A request to upgrade; `[]` leaves a header out, two values send it twice. */
function handshake(changes: Record<string, string | string[]> = {}, first = "GET / HTTP/1.1") {
  const headers: typeof changes = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Protocol": NAME,
    ...changes,
  };
  const lines = Object.entries(headers).flatMap(([name, values]) =>
    [values].flat().map((value) => `${name}: ${value}`)
  );
  return [first, ...lines, "", ""].join("\r\n");
}

/** A masked frame, as clients send them. */
function encodeFrame(opcode: number, payload: string | Uint8Array = "", fin = true): Buffer {
  const data = Buffer.from(payload as string), n = data.length;
  const head = Buffer.alloc(n < 126 ? 2 : n < 65536 ? 4 : 10);
  head[0] = opcode | (fin ? 128 : 0);
  head[1] = 128 | (n < 126 ? n : n < 65536 ? 126 : 127);
  if (head.length === 4) head.writeUInt16BE(n, 2);
  if (head.length === 10) head.writeUInt32BE(n, 6);
  const mask = Buffer.from([1, 2, 3, 4]);
  return Buffer.concat([head, mask, data.map((byte, i) => byte ^ mask[i & 3])]);
}

function closeFrame(code: number): Buffer {
  return encodeFrame(CLOSE, Uint8Array.of(code >> 8, code & 255));
}

/** Sends a request and gives the response. */
async function request(port: number, text: string): Promise<HttpResponse> {
  const raw = Raw.to(port);
  raw.socket.write(text, "latin1");
  const answer = await raw.nextResponse(text.split(" ")[0]);
  raw.socket.destroy();
  return answer ?? assert.fail("no answer");
}

/** A client as an application has one. */
async function connect(port: number, name = NAME): Promise<WebSocket> {
  const socket = new WebSocket(`ws://127.0.0.1:${port}/`, name);
  cleanups.push(() => socket.close());
  socket.binaryType = "arraybuffer";
  await once(socket, "open");
  return socket;
}

/** Sends messages all at once and gives as many replies. */
function replies(socket: WebSocket, messages: Message[]): Promise<(string | ArrayBuffer)[]> {
  const collected = collect(socket, messages.length);
  for (const message of messages) socket.send(message);
  return collected;
}

/** Gives the next messages that arrive. Fails if the connection is closed before. */
function collect(socket: WebSocket, count: number): Promise<(string | ArrayBuffer)[]> {
  return new Promise((resolve, reject) => {
    const received: (string | ArrayBuffer)[] = [];
    socket.onmessage = ({ data }) => received.push(data) === count && resolve(received);
    socket.onclose = ({ code }) =>
      reject(new Error(`closed with ${code} after ${received.length}`));
  });
}

/** Whether the server still serves: a new client gets its reply. */
async function assertServes(port: number): Promise<void> {
  const raw = await Raw.open(port);
  assert.equal(await raw.ask("serving"), "gnivres");
  raw.socket.destroy();
}

/** Tries until something works, at most for 15 s. */
async function eventually<T>(attempt: () => Promise<T>, what = ""): Promise<T> {
  for (let tries = 0;; tries++) {
    try {
      return await attempt();
    } catch (error) {
      if (tries === 150) throw new Error(`still not, ${what}`, { cause: error });
      await sleep(100);
    }
  }
}

/** Random whole numbers below n, the same in each run. */
function randomNumbers(seed: number): (n: number) => number {
  return (n) => {
    seed = Math.imul(seed ^ seed >>> 15, 0x2c1b3c6d) + 0x9e3779b9 | 0;
    return ((seed ^ seed >>> 13) >>> 0) % n;
  };
}

// ---- HTTP ---------------------------------------------------------------------------------------

describe("HTTP", () => {
  const get = (port: number, method: string, target: string, host = "localhost") =>
    request(port, `${method} ${target} HTTP/1.1\r\nHost: ${host}\r\n\r\n`);

  test("GET / is the page, with a policy that allows its own style and script only", async () => {
    const { status, header, body } = await get(listen(), "GET", "/");
    assert.equal(status, 200);
    assert.equal(body, page);
    assert.deepEqual(header("content-type"), ["text/html; charset=utf-8"]);
    assert.deepEqual(header("x-content-type-options"), ["nosniff"]);
    const policy = header("content-security-policy")[0];
    assert.match(policy, /default-src 'none'/);
    assert.match(policy, /connect-src ws: wss:/);
    assert.doesNotMatch(policy, /unsafe|\*/);
    for (const name of ["style", "script"]) {
      const text = page.match(`<${name}[^>]*>([^]*?)</${name}>`)![1];
      const hash = createHash("sha256").update(text).digest("base64");
      assert.match(policy.match(`${name}-src ([^;]*)`)![1], new RegExp(RegExp.escape(hash)));
    }
  });

  test("the page works with CR LF line ends, too", async () => {
    const folder = temporaryFolder();
    for (const file of ["server.ts", "deno.json"]) cpSync(join(here, file), join(folder, file));
    writeFileSync(join(folder, "index.html"), page.replaceAll("\n", "\r\n"));
    const program = startProgram(["--port", "0"], {}, join(folder, "server.ts"));
    const { body, header } = await get(await program.port(), "GET", "/");
    assert.equal(body, page);
    const script = page.match(/<script[^>]*>([^]*?)<\/script>/)![1];
    const hash = createHash("sha256").update(script).digest("base64");
    assert.ok(header("content-security-policy")[0].includes(hash));
  });

  test("the page suggests only subprotocols that the server speaks", () => {
    const suggestions = page.matchAll(/<option[^>]*value="([^"]+)"/g);
    const names = [...suggestions].map(([, name]) => name);
    assert.deepEqual(names.filter((name) => !Object.hasOwn(subprotocols, name)), []);
    assert.ok(names.includes(NAME));
  });

  test("HEAD / has the headers of the page and no body", async () => {
    const raw = Raw.to(listen());
    raw.socket.write("HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    const answer = await raw.nextResponse("HEAD");
    assert.equal(answer?.status, 200);
    assert.deepEqual(answer.header("content-type"), ["text/html; charset=utf-8"]);
    assert.equal(answer.header("content-security-policy").length, 1);
    assert.equal(await raw.nextFrame(), undefined, "nothing follows");
  });

  test("the page takes a query", async () => {
    assert.equal((await get(listen(), "GET", "/?server=wss://example.org/")).status, 200);
  });

  for (const path of ["/absent", "//", "/index.html", "/server.ts", "/%2e%2e/server.ts"]) {
    test(`GET ${path} is answered with 404 in plain text`, async () => {
      const { status, header } = await get(listen(), "GET", path);
      assert.equal(status, 404);
      assert.deepEqual(header("content-type"), ["text/plain; charset=utf-8"]);
      assert.deepEqual(header("x-content-type-options"), ["nosniff"]);
    });
  }

  for (const method of ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"]) {
    test(`${method} is answered with 405 and the methods allowed`, async () => {
      const { status, header } = await get(listen(), method, "/");
      assert.equal(status, 405);
      assert.deepEqual(header("allow"), ["GET, HEAD"]);
    });
  }

  for (const host of ["a b", "localhost:99999", "[bad", "^", "a/b", "a@b", "a?b", "a#b", "a\\b"]) {
    test(`the Host ${host} is answered with 400`, async () => {
      assert.equal((await get(listen(), "GET", "/", host)).status, 400);
    });
  }
});

// ---- Handshake ----------------------------------------------------------------------------------

describe("a handshake", () => {
  test("is answered with the hash of its key", async () => {
    const { status, header } = await request(listen(), handshake());
    assert.equal(status, 101);
    assert.deepEqual(header("sec-websocket-accept"), ["s3pPLMBiTxaQ9kYGzzhZRbK+xOo="]);
    assert.match(header("upgrade")[0], /^websocket$/i);
    assert.match(header("connection")[0], /^upgrade$/i);
    assert.deepEqual(header("sec-websocket-extensions"), []);
  });

  const accepted: Record<string, [string, string | string[]]> = {
    "Upgrade in another case": ["Upgrade", "WebSocket"],
    "Upgrade with other protocols": ["Upgrade", "h2c, websocket"],
    "Connection in another case": ["Connection", "upgrade"],
    "Connection with other tokens": ["Connection", "keep-alive, Upgrade"],
    "Connection over two lines": ["Connection", ["keep-alive", "Upgrade"]],
    "an extension that nobody knows": ["Sec-WebSocket-Extensions", "x-unknown"],
    "any Origin, where none was chosen": ["Origin", "https://example.org"],
  };
  for (const [what, [name, value]] of Object.entries(accepted)) {
    test(`is accepted with ${what}`, async () => {
      assert.equal((await request(listen(), handshake({ [name]: value }))).status, 101);
    });
  }

  for (const path of ["/a/path/of/a/proxy", "/?query", "//", "/absent"]) {
    test(`is accepted at the path ${path}`, async () => {
      const text = handshake({}, `GET ${path} HTTP/1.1`);
      assert.equal((await request(listen(), text)).status, 101);
    });
  }

  for (const name of ["Upgrade", "Connection"]) {
    test(`with a byte in ${name} that is no blank ends nothing`, async () => {
      const program = startProgram(["--port", "0", "--quiet"]);
      const port = await program.port(), raw = Raw.to(port);
      raw.socket.write(Buffer.from(handshake({ [name]: "\xa0Upgrade, \xa0websocket" }), "latin1"));
      assert.equal((await raw.nextResponse())?.status, 400);
      assert.equal(program.err, "");
    });
  }

  for (const version of [[], "8", "14", "013", "x"]) {
    test(`of version ${version} is answered with 426 and the one we speak`, async () => {
      const text = handshake({ "Sec-WebSocket-Version": version });
      const { status, header } = await request(listen(), text);
      assert.equal(status, 426);
      assert.deepEqual(header("sec-websocket-version"), ["13"]);
    });
  }

  const key = "dGhlIHNhbXBsZSBub25jZQ==";
  const refused: [string, string, string | string[], RegExp][] = [
    ["without a key", "Sec-WebSocket-Key", [], /Sec-WebSocket-Key/],
    ["with an empty key", "Sec-WebSocket-Key", "", /Sec-WebSocket-Key/],
    ["with a short key", "Sec-WebSocket-Key", "c2hvcnQ=", /Sec-WebSocket-Key/],
    ["with a key of 32 bytes", "Sec-WebSocket-Key", `${"A".repeat(43)}=`, /Sec-WebSocket-Key/],
    ["with a key not in base64", "Sec-WebSocket-Key", `${"!".repeat(22)}==`, /Sec-WebSocket-Key/],
    ["with two keys", "Sec-WebSocket-Key", [key, key], /Sec-WebSocket-Key/],
    ["without Upgrade", "Upgrade", [], /Upgrade: websocket/],
    ["with another Upgrade", "Upgrade", "websockets", /Upgrade: websocket/],
    ["without Connection", "Connection", [], /Connection: Upgrade/],
    ["with another Connection", "Connection", "keep-alive, upgraded", /Connection: Upgrade/],
  ];
  for (const [what, name, value, words] of refused) {
    test(`${what} is answered with 400 in few words`, async () => {
      const { status, header, body } = await request(listen(), handshake({ [name]: value }));
      assert.equal(status, 400);
      assert.deepEqual(header("content-type"), ["text/plain; charset=utf-8"]);
      assert.match(body, words);
      assert.ok(body.length < 200);
    });
  }

  for (const header of ["Content-Length: 3", "Transfer-Encoding: chunked"]) {
    test(`with a body (${header}) is refused with 400, and the body is not read as frames`, async () => {
      const [name, value] = header.split(": ");
      const raw = Raw.to(listen());
      raw.socket.write(handshake({ [name]: value }));
      assert.equal((await raw.nextResponse())?.status, 400);
    });
  }

  test("with several faults is told the subprotocols first", async () => {
    const changes = { "Sec-WebSocket-Protocol": [], "Sec-WebSocket-Version": "8" };
    const { status, body } = await request(listen(), handshake(changes));
    assert.equal(status, 400);
    assert.match(body, /^Sec-WebSocket-Protocol must offer one of/);
  });

  for (const method of ["POST", "PUT", "HEAD"]) {
    test(`with ${method} is answered with 405`, async () => {
      const { status, header } = await request(listen(), handshake({}, `${method} / HTTP/1.1`));
      assert.equal(status, 405);
      assert.match(header("allow")[0], /^GET/);
    });
  }

  for (const first of ["GET / HTTP/1.1", "GET / HTTP/1.0"]) {
    test(`without a Host, ${first}, is answered with 400`, async () => {
      assert.equal((await request(listen(), handshake({ Host: [] }, first))).status, 400);
    });
  }

  for (const [method, status] of [["GET", 200], ["POST", 405]] as const) {
    test(`that was refused leaves the connection usable: ${method} is ${status}`, async () => {
      const raw = Raw.to(listen());
      raw.socket.write(handshake({ "Sec-WebSocket-Version": "8" }));
      assert.equal((await raw.nextResponse())?.status, 426);
      raw.socket.write(`${method} / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n`);
      assert.equal((await raw.nextResponse())?.status, status);
    });
  }
});

// ---- Subprotocols -------------------------------------------------------------------------------

describe("selecting a subprotocol", () => {
  const shout: Subprotocol = () => (message) => String(message).toUpperCase();
  const selected: Record<string, [string | string[], string]> = {
    "the only one": [NAME, NAME],
    "the second of two": [`other, ${NAME}`, NAME],
    "one without blanks": [`a,${NAME},b`, NAME],
    "one with blanks and tabs": [`a ,\t ${NAME} \t, b`, NAME],
    "one beside empty items": [`,, ${NAME},`, NAME],
    "one on the second line": [["a, b", `c, ${NAME}`], NAME],
    "the first of two that are spoken": [`a, added, ${NAME}`, "added"],
    "the first of two on two lines": [[NAME, "added"], NAME],
  };
  for (const [offer, [header, name]] of Object.entries(selected)) {
    test(`the server selects ${offer} and names it once`, async () => {
      const text = handshake({ "Sec-WebSocket-Protocol": header });
      const response = await request(listenWith(shout), text);
      assert.equal(response.status, 101);
      assert.deepEqual(response.header("sec-websocket-protocol"), [name]);
    });
  }

  const inherited = ["__proto__", "constructor", "toString", "hasOwnProperty"];
  const similar = [NAME.toUpperCase(), `${NAME}s`, `"${NAME}"`, `${NAME}\xa0`, `x,\xa0${NAME}`];
  for (const offer of [[], "", ",", "other", ...similar, ...inherited]) {
    test(`offering ${JSON.stringify(offer)} is refused with 400 and the names spoken`, async () => {
      const text = handshake({ "Sec-WebSocket-Protocol": offer });
      const response = await request(listenWith(shout), text);
      assert.equal(response.status, 400);
      assert.match(response.body, new RegExp(`${NAME}, echo, count, chat, on-demand, added`));
      assert.deepEqual(response.header("content-type"), ["text/plain; charset=utf-8"]);
    });
  }

  test("a default subprotocol serves clients that offer none, and is not named", async () => {
    const port = listen({ defaultSubprotocol: "echo" });
    const raw = Raw.to(port);
    raw.socket.write(handshake({ "Sec-WebSocket-Protocol": [] }));
    const response = await raw.nextResponse();
    assert.equal(response?.status, 101);
    assert.deepEqual(response.header("sec-websocket-protocol"), []);
    assert.equal(await raw.ask("same"), "same");
  });

  test("a default subprotocol does not serve clients that offer unknown names", async () => {
    const port = listen({ defaultSubprotocol: "echo" });
    const text = handshake({ "Sec-WebSocket-Protocol": "unknown" });
    assert.equal((await request(port, text)).status, 400);
  });
});

describe("subprotocols", () => {
  test("echo answers text and bytes with themselves", async () => {
    const raw = await Raw.open(listen(), "echo");
    assert.equal(await raw.ask("noe\u0308l"), "noe\u0308l");
    assert.equal(await raw.ask(Uint8Array.of(1, 2, 255)), "0102ff");
    assert.equal(await raw.ask(""), "");
  });

  test("count counts the seconds for each connection, and starts again on reset", async () => {
    const port = listen();
    const [first, second] = [await Raw.open(port, "count"), await Raw.open(port, "count")];
    const number = async (raw: Raw) => `${(await raw.nextFrame())?.data}`;
    assert.deepEqual([await number(first), await number(first)], ["1", "2"]);
    first.socket.write(encodeFrame(TEXT, "reset"));
    assert.equal(await number(first), "1");
    assert.deepEqual([await number(second), await number(second)], ["1", "2"]);
  });

  test("1,000 count connections that are reset leave no timer behind", async () => {
    const program = startEdited(`
      const timers = new Set<unknown>();
      const { setInterval: start, clearInterval: stop } = globalThis;
      globalThis.setInterval = ((...args: Parameters<typeof start>) => {
        const timer = start(...args);
        timers.add(timer);
        return timer;
      }) as typeof start;
      globalThis.clearInterval = (timer) => (timers.delete(timer), stop(timer));
      subprotocols["timers"] = () => () => String(timers.size);
    `);
    const port = await program.port();
    const asking = await Raw.open(port, "timers");
    for (let round = 0; round < 10; round++) {
      const counting = Array.from({ length: 100 }, () => Raw.open(port, "count"));
      const clients = await Promise.all(counting);
      if (round === 9) assert.ok(Number(await asking.ask("")) >= 100);
      for (const { socket } of clients) socket.resetAndDestroy();
    }
    await eventually(async () => assert.equal(await asking.ask(""), "0"), "no timers");
  });

  test("chat sends each message to all members, its sender too", async () => {
    const port = listen();
    const members = await Promise.all([1, 2, 3].map(() => Raw.open(port, "chat")));
    members[1].socket.write(encodeFrame(TEXT, "hello all"));
    for (const member of members) assert.equal(`${(await member.nextFrame())?.data}`, "hello all");
    members[0].socket.resetAndDestroy();
    members[1].socket.write(encodeFrame(BINARY, Uint8Array.of(7)));
    assert.deepEqual([...(await members[2].nextFrame())!.data], [7]);
  });

  test("a chat member that does not read is closed with 1008; the others miss nothing", async () => {
    const port = listen({ limits: { unreadBytes: 1024 * 1024 } });
    const [reading, silent] = [await Raw.open(port, "chat"), await Raw.open(port, "chat")];
    silent.socket.pause();
    const text = "x".repeat(100_000);
    for (let i = 0; i < 300; i++) {
      assert.equal((await reading.ask(text))?.length, text.length);
    }
    silent.socket.resume();
    assert.match(await silent.closeReason(), /^1008 too many unread/);
  });

  const answers: Record<string, string | RegExp> = {
    "help": /close CODE REASON.*headers, help$/,
    "what?": /close CODE REASON.*headers, help$/,
    "delay 10 hello  you": "hello  you",
    "delay 60001 x": /at most 60000/,
    "delay x y": /at most 60000/,
    "repeat 1 hello": "hello",
    "repeat 99999999 x": /at most \d+ times/,
    "repeat 1.5 x": /at most \d+ times/,
    "bytes 3": "000000",
    "bytes 0": "",
    "bytes 1048577": /at most 1048576/,
    "bytes -1": /at most 1048576/,
    "bytes 99999999999999999999": /at most 1048576/,
    "close 1005 x": /1000 to 1003, 1007 to 1014 or 3000 to 4999/,
    "close 2999": /1000 to 1003, 1007 to 1014 or 3000 to 4999/,
    "close now": /1000 to 1003, 1007 to 1014 or 3000 to 4999/,
    [`close 4000 ${"é".repeat(62)}`]: /at most 123 bytes/,
  };
  for (const [command, expected] of Object.entries(answers)) {
    test(`on-demand answers "${command.slice(0, 30)}" in one line`, async () => {
      const raw = await Raw.open(listen(), "on-demand");
      const reply = await raw.ask(command);
      if (typeof expected === "string") assert.equal(reply, expected);
      else assert.match(reply!, expected);
      assert.doesNotMatch(reply!, /\n/);
    });
  }

  for (const code of [1000, 1003, 1007, 1014, 3000, 4999]) {
    test(`on-demand closes with ${code} and the reason`, async () => {
      const raw = await Raw.open(listen(), "on-demand");
      raw.socket.write(encodeFrame(TEXT, `close ${code} bye bye`));
      assert.equal(await raw.closeReason(), `${code} bye bye`);
    });
  }

  test("on-demand repeats a text as often as it is told", async () => {
    const socket = await connect(listen(), "on-demand");
    const replies = collect(socket, 1000);
    socket.send("repeat 1000 hello");
    assert.deepEqual(new Set(await replies), new Set(["hello"]));
  });

  test("on-demand sends no delayed message after the end, and limits those that wait", async () => {
    const port = listen();
    const raw = await Raw.open(port, "on-demand");
    for (let i = 0; i < 100; i++) raw.socket.write(encodeFrame(TEXT, "delay 60000 x"));
    assert.match(`${(await raw.nextFrame())?.data}`, /^delay .*already$/);
    raw.socket.write(encodeFrame(TEXT, "close 4000"));
    while ((await raw.nextFrame())?.opcode !== CLOSE);
    await assertServes(port);
  });

  test("on-demand shows the handshake as the server got it", async () => {
    const raw = Raw.to(listen());
    const headers = { "Sec-WebSocket-Protocol": "on-demand", "X-Forwarded-For": "192.0.2.1" };
    raw.socket.write(handshake(headers, "GET /a/path?query HTTP/1.1"));
    assert.equal((await raw.nextResponse())?.status, 101);
    const shown = JSON.parse((await raw.ask("headers"))!);
    assert.equal(shown.request, "GET /a/path?query HTTP/1.1");
    assert.equal(shown.headers["x-forwarded-for"], "192.0.2.1");
    assert.equal(shown.address, `127.0.0.1:${raw.socket.localPort}`);
  });

  test("all subprotocols work side by side on one port", async () => {
    const port = listen();
    const [reversing, echoing] = [await Raw.open(port), await Raw.open(port, "echo")];
    const counting = await Raw.open(port, "count");
    assert.equal(await echoing.ask("hello"), "hello");
    assert.equal(await reversing.ask("hello"), "olleh");
    assert.equal(`${(await counting.nextFrame())?.data}`, "1");
  });

  test("a subprotocol that returns nothing gets no messages and sends no replies", async () => {
    const raw = await Raw.open(listenWith(() => {}), "added");
    raw.socket.write(Buffer.concat([encodeFrame(TEXT, "x"), encodeFrame(PING, "alive")]));
    assert.equal((await raw.nextFrame())?.opcode, PONG);
  });

  test("a subprotocol may speak first and close, and hears of the end once", async () => {
    let ends = 0;
    const port = listenWith((connection) => {
      connection.onclose = () => void ends++;
      connection.send("hello");
      connection.send(Uint8Array.of(1, 2));
      return () => {
        connection.close(4000, "that is all");
        connection.send("too late");
      };
    });
    const raw = await Raw.open(port, "added");
    assert.equal(`${(await raw.nextFrame())?.data}`, "hello");
    assert.deepEqual([...(await raw.nextFrame())!.data], [1, 2]);
    raw.socket.write(encodeFrame(TEXT, "bye"));
    assert.equal(await raw.closeReason(), "4000 that is all");
    raw.socket.write(closeFrame(4000));
    await once(raw.socket, "close");
    assert.equal(ends, 1);
  });

  test("a subprotocol may close a connection as it opens, and hears of that end", async () => {
    let ends = 0;
    const port = listenWith((connection) => {
      connection.close(4001, "not today");
      connection.onclose = () => void ends++;
    });
    assert.equal(await (await Raw.open(port, "added")).closeReason(), "4001 not today");
    assert.equal(ends, 1);
  });

  test("a subprotocol gets no message after it has closed", async () => {
    let calls = 0;
    const port = listenWith((connection) => () => {
      calls++;
      connection.close();
    });
    const raw = await Raw.open(port, "added");
    raw.socket.write(Buffer.concat(Array(100).fill(encodeFrame(TEXT, "x"))));
    await raw.closeReason();
    assert.equal(calls, 1);
  });

  for (
    const [code, reason] of [
      [999, ""],
      [1004, ""],
      [1005, ""],
      [1006, ""],
      [1015, ""],
      [
        2000,
        "",
      ],
      [5000, ""],
      [1000.5, ""],
      [1000, "é".repeat(62)],
    ] as const
  ) {
    test(`connection.close(${code}) with ${reason.length} characters is a RangeError`, async () => {
      const failure = Promise.withResolvers<unknown>();
      const port = listenWith((connection) => {
        try {
          connection.close(code, reason);
          failure.resolve(undefined);
        } catch (error) {
          failure.resolve(error);
        }
      });
      await Raw.open(port, "added");
      assert.ok(await failure.promise instanceof RangeError);
    });
  }
});

// ---- Messages -----------------------------------------------------------------------------------

const texts: Record<string, [string, string]> = {
  "ASCII": ["Hello, world!", "!dlrow ,olleH"],
  "a combining tilde": ["man\u0303ana", "anan\u0303am"],
  "flags": ["🇩🇪🇫🇷", "🇫🇷🇩🇪"],
  "a family": ["a👨‍👩‍👧‍👦b", "b👨‍👩‍👧‍👦a"],
  "keycaps": ["1️⃣2️⃣", "2️⃣1️⃣"],
  "skin tones": ["👋🏽👍🏿", "👍🏿👋🏽"],
  "Hangul jamo": ["\u1112\u1161\u11ab\u1100\u1173\u11af", "\u1100\u1173\u11af\u1112\u1161\u11ab"],
  "a Devanagari conjunct": ["क्षि!", "!क्षि"],
  "CR LF": ["a\r\nb", "b\r\na"],
  "CR LF in a long text": [`${"x".repeat(50)}\r\ny`, `y\r\n${"x".repeat(50)}`],
  "LF CR": ["a\n\rb", "b\r\na"],
  "U+FEFF in front": ["\ufeffab", "ba\ufeff"],
  "U+FEFF at the end": ["ab\ufeff", "\ufeffba"],
  "NUL and controls": ["\0a\x1b\x7f", "\x7f\x1ba\0"],
  "nothing": ["", ""],
};

describe("reverse", () => {
  const segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });
  const clusters = (text: string) =>
    [...segmenter.segment(text)].map(({ segment }) => segment).reverse().join("");
  const pieces = [
    ..."aZ 0.\n\r\tßéж中あ한",
    "\r\n",
    ..."\u0301\u200d\ufe0f\u20e3\ufeff\u1112\u1161\u11ab\u0915\u094d\u0600\u0e33\u2028",
    ...["🇩", "🇪", "👩", "🏽", "👨‍👩‍👧", "1️⃣", "𝒳", "क्षि", "\ud800", "\udc00"],
  ];
  const next = randomNumbers(7);
  const mixed = (length: number) =>
    Array.from({ length }, () => pieces[next(next(3) ? pieces.length : 8)]).join("");
  const ascii = (length: number) => String.fromCharCode(...Array.from({ length }, () => next(128)));

  test("gives the clusters of Intl.Segmenter in reverse order, on random mixes", () => {
    for (let i = 0; i < 3000; i++) {
      const text = mixed(next(40));
      assert.equal(reverse(text), clusters(text), JSON.stringify(text));
    }
  });

  test("does so for all lengths from 0 to 200", () => {
    for (let length = 0; length <= 200; length++) {
      // U+FFFF leaves bytes behind that must not be seen again.
      const texts = ["\uffff".repeat(length + 8), ascii(length), mixed(length)];
      for (const text of [...texts, "x".repeat(length) + "é\u0301"]) {
        assert.equal(reverse(text), clusters(text), JSON.stringify(text));
      }
    }
  });

  test("does so for large texts, even larger than a message may be", () => {
    const huge = ["ab", "aé"].map((text) => text.repeat(limits.messageBytes / 2 + 5));
    const large = [mixed(40_000), "ab\r\ncdefg".repeat(9_000), ascii(30_000)];
    for (const text of [...huge, ...large, mixed(3)]) {
      assert.ok(reverse(text) === clusters(text));
    }
  });

  const unicode = "/usr/share/unicode/auxiliary/GraphemeBreakTest.txt"; // Debian's unicode-data
  test("does so for each line of Unicode's GraphemeBreakTest, and for two in a row", () => {
    const lines = readFileSync(unicode, "utf8").matchAll(/^(÷[^#\n]*)/gm);
    const texts = [...lines].map(([line]) =>
      String.fromCodePoint(
        ...Array.from(line.matchAll(/[0-9A-F]+/g), ([code]) => parseInt(code, 16)),
      )
    );
    assert.ok(texts.length > 500);
    for (const [i, text] of texts.entries()) {
      for (const mixed of [text, `é${text}ж`, text + texts[next(i + 1)]]) {
        assert.equal(reverse(mixed), clusters(mixed), JSON.stringify(mixed));
      }
    }
  }, without(unicode, existsSync(unicode)));

  test("leaves the bytes it is given as they are", () => {
    const bytes = Uint8Array.of(1, 2, 3);
    assert.deepEqual([...reverse(bytes) as Uint8Array], [3, 2, 1]);
    assert.deepEqual([...bytes], [1, 2, 3]);
  });
});

describe("messages", () => {
  for (const [what, [text, reversed]] of Object.entries(texts)) {
    test(`text with ${what} comes back reversed, as text`, async () => {
      assert.deepEqual(await replies(await connect(listen()), [text]), [reversed]);
    });
  }

  for (const bytes of [[], [0], [1, 2, 255], Array(70_000).fill(0).map((_, i) => i & 255)]) {
    test(`${bytes.length} bytes come back reversed, as bytes`, async () => {
      const [reply] = await replies(await connect(listen()), [Uint8Array.from(bytes)]);
      assert.ok(reply instanceof ArrayBuffer);
      assert.deepEqual([...new Uint8Array(reply)], bytes.toReversed());
    });
  }

  test("empty ones have empty replies of the same kind, each in one frame", async () => {
    const raw = await Raw.open(listen());
    for (const opcode of [TEXT, BINARY]) {
      raw.socket.write(encodeFrame(opcode));
      assert.deepEqual(await raw.nextFrame(), { fin: true, opcode, data: Buffer.alloc(0) });
    }
  });

  for (const [opcode, reply] of [[TEXT, "zéyx"], [BINARY, "7aa9c37978"]] as const) {
    test(`in fragments with a ping between are one message (opcode ${opcode})`, async () => {
      const raw = await Raw.open(listen());
      raw.socket.write(encodeFrame(opcode, "x", false));
      raw.socket.write(encodeFrame(CONTINUATION, Buffer.from("yé").subarray(0, 2), false));
      raw.socket.write(encodeFrame(PING, "alive?"));
      const pong = await raw.nextFrame();
      assert.deepEqual([pong?.opcode, `${pong?.data}`], [PONG, "alive?"]);
      raw.socket.write(encodeFrame(CONTINUATION, "", false));
      raw.socket.write(encodeFrame(CONTINUATION, Buffer.from("éz").subarray(1), true));
      const { data, opcode: kind } = (await raw.nextFrame())!;
      assert.deepEqual([kind, data.toString(opcode === TEXT ? "utf8" : "hex")], [opcode, reply]);
    });
  }

  test("31,000 one after the other are all answered", async () => {
    const raw = await Raw.open(await startProgram(["--port", "0", "--quiet"]).port());
    for (let i = 0; i < 31_000; i++) assert.equal(await raw.ask("abc"), "cba", `message ${i}`);
  });

  test("on Bun, 31,000 empty ones one after the other are all answered", async () => {
    const raw = await Raw.open(await startProgram(["--port", "0", "--quiet"]).port());
    for (let i = 0; i < 31_000; i++) assert.equal(await raw.ask(""), "", `message ${i}`);
  }, onDeno && "Deno does not tell whether empty messages have left");

  test("1,000 at once are answered in order", async () => {
    const messages = Array.from({ length: 1000 }, (_, n) => `message ${n}`);
    const expected = messages.map((message) => reverse(message));
    assert.deepEqual(await replies(await connect(listen()), messages), expected);
  });

  test("20,000 at once, to a client that reads, lose none", async () => {
    const messages = Array.from({ length: 20_000 }, (_, n) => `${n}`);
    const port = await startProgram(["--port", "0", "--quiet"]).port();
    const received = await replies(await connect(port), messages);
    assert.ok(received.every((reply, n) => reply === reverse(`${n}`)));
  });

  test("of twenty clients are answered each to its own", async () => {
    const port = listen();
    await Promise.all(Array.from({ length: 20 }, async (_, n) => {
      const messages = Array.from({ length: 50 }, (_, i) => `${n}:${i}`);
      const received = await replies(await connect(port), messages);
      assert.deepEqual(received, messages.map((message) => reverse(message)));
    }));
  });

  test("a ping is answered with its data", async () => {
    const raw = await Raw.open(listen());
    raw.socket.write(encodeFrame(PING, "p".repeat(125)));
    const { opcode, data } = (await raw.nextFrame())!;
    assert.deepEqual([opcode, `${data}`], [PONG, "p".repeat(125)]);
  });

  test("a close is answered with its code, and ends the connection", async () => {
    const raw = await Raw.open(listen());
    raw.socket.write(closeFrame(1000));
    assert.match(await raw.closeReason(), /^1000 /);
    await until(raw.socket, () => undefined);
  });
});

// ---- Console and options ------------------------------------------------------------------------

describe("the console", () => {
  test("tells of connections, messages and replies", async () => {
    const program = startProgram(["--port", "0"]);
    const raw = await Raw.open(await program.port());
    const peer = `127.0.0.1:${raw.socket.localPort}`;
    for (const message of ["Hello, world!", "", Uint8Array.of(1, 2, 3)]) await raw.ask(message);
    raw.socket.write(closeFrame(1000));
    await program.prints(/^closed: /m);
    assert.deepEqual(program.out.trimEnd().split("\n").slice(1), [
      `connected: ${peer}, ${NAME}`,
      "received data: Hello, world!, replying: !dlrow ,olleH",
      "received data: , replying: ",
      "received data: 3 bytes, replying: 3 bytes",
      `closed: ${peer}, code 1000`,
    ]);
    assert.equal(program.err, "");
  });

  test("tells of a client that is gone without a word", async () => {
    const program = startProgram(["--port", "0"]);
    const raw = await Raw.open(await program.port());
    raw.socket.resetAndDestroy();
    await program.prints(/^closed: 127\.0\.0\.1:\d+, code 1006$/m);
  });

  test("shows controls of client text escaped, and 80 characters at most", async () => {
    const program = startProgram(["--port", "0"]);
    const raw = await Raw.open(await program.port());
    for (const message of ["\x1b[2J\r\n\x9b\u202e\u2028", "x".repeat(81), "😀".repeat(90), "end"]) {
      await raw.ask(message);
    }
    await program.prints(/replying: dne$/m);
    const received = program.out.split("\n").filter((line) => line.startsWith("received data: "));
    assert.deepEqual(received.slice(0, 3), [
      "received data: \\u001b[2J\\u000d\\u000a\\u009b\\u202e\\u2028, " +
      "replying: \\u2028\\u202e\\u009b\\u000d\\u000aJ2[\\u001b",
      ...[["x".repeat(80), 81], ["😀".repeat(80), 180]].map(([start, length]) =>
        `received data: ${start}… (length ${length}), replying: ${start}… (length ${length})`
      ),
    ]);
  });

  test("shows what a person can read, and counts the lines left out", async () => {
    const program = startProgram(["--port", "0"]);
    const socket = await connect(await program.port());
    await replies(socket, Array(10_000).fill("x".repeat(100)));
    socket.close();
    await eventually(async () => {
      await sleep(0);
      const shown = program.out.match(/^(connected|received data|closed): .*$/gm) ?? [];
      const left = [...program.out.matchAll(/^\((\d+) more lines\)$/gm)];
      assert.ok(left.length > 0);
      assert.equal(left.reduce((sum, [, n]) => sum + Number(n), shown.length), 10_002);
    }, "all lines");
  });

  test("with --quiet says only where it listens", async () => {
    const program = startProgram(["--port", "0", "--quiet"]);
    const port = await program.port();
    await assertServes(port);
    program.signal("SIGTERM");
    assert.equal(await program.exitStatus(), 0);
    assert.equal(program.out, `Listening on http://localhost:${port}/\n`);
    assert.equal(program.err, "");
  });

  test("names the reason of a refused handshake", async () => {
    const program = startProgram(["--port", "0"]);
    await request(await program.port(), handshake({ "Sec-WebSocket-Protocol": [] }));
    await program.prints(/^refused: 127\.0\.0\.1:\d+, 400, Sec-WebSocket-Protocol must offer/m);
  });

  test("shows what is sent unasked, after the message that causes it", async () => {
    const program = startProgram(["--port", "0"]);
    const raw = await Raw.open(await program.port(), "on-demand");
    const { localPort } = raw.socket;
    raw.socket.write(encodeFrame(TEXT, "repeat 2 hello"));
    raw.socket.write(encodeFrame(TEXT, "close 4001 bye"));
    await program.prints(/^closed: /m);
    assert.deepEqual(program.out.trimEnd().split("\n").slice(2), [
      "received data: repeat 2 hello, replying: (nothing)",
      "sending data: hello",
      "sending data: hello",
      "received data: close 4001 bye, replying: (nothing)",
      `closed: 127.0.0.1:${localPort}, code 4001`,
    ]);
  });

  test("shows at most 100 lines in a tenth of a second", async () => {
    const program = startProgram(["--port", "0"]);
    const socket = await connect(await program.port());
    const start = performance.now();
    await replies(socket, Array(10_000).fill("x"));
    const tenths = Math.ceil((performance.now() - start) / 100) + 1;
    const shown = program.out.match(/^received data: /gm)?.length ?? 0;
    assert.ok(shown <= 100 * tenths, `${shown} lines in ${tenths} tenths of a second`);
  });

  test("on a full disk does not end the server", async () => {
    const args = [process.execPath, ...runtimeArgs, join(here, "server.ts")];
    const { port, stop } = serve({ port: 0, quiet: true });
    await stop(); // so the port is free
    const shell = ["-c", 'exec "$@" >/dev/full 2>&1', "sh", ...args, "--port", `${port}`];
    const program = new Program("sh", shell);
    await eventually(() => assertServes(port), "it serves");
    program.signal("SIGTERM");
    assert.equal(await program.exitStatus(), 0);
  }, process.platform !== "linux" && "for Linux");
});

describe("options", () => {
  const absent = join(here, "absent.pem"), wrongFile = join(here, "index.html");
  const wrong: [string[], RegExp, Record<string, string>?][] = [
    [["--unknown"], /--unknown/],
    [["extra"], /extra/],
    [["--port"], /--port/],
    [["--port", "65536"], /65536/],
    [["--port", "1e3"], /1e3/],
    [["--port="], /port/],
    [["--port", "x\ny"], /port/],
    [["--quiet=yes"], /quiet/],
    [["--port", "-1"], /--port needs a value/],
    [["--cert", "--key"], /--cert needs a value/],
    [["--hostname="], /--hostname/],
    [["--hostname", "no-such-host.invalid", "--port", "0"], /no-such-host\.invalid.*--hostname/],
    [["--default", "nope"], /nope.*|echo/],
    ...["LOCALHOST", "*", "", "example.org", "https://a.example/path", "ws://a.example"].map((
      origin,
    ): [string[], RegExp] => [["--origin", origin], /an origin must be like/]),
    [["--cert", wrongFile], /--key/],
    [["--key", wrongFile], /--cert/],
    [["--port", "0", "--cert", absent, "--key", absent], /absent\.pem/],
    [["--port", "0", "--cert", "", "--key", ""], /--cert/],
    [["--port", "0", "--cert", wrongFile, "--key", wrongFile], /./],
    [["--port", "0", "--hostname", "203.0.113.1"], /./],
    [[], /abc/, { PORT: "abc" }],
  ];
  for (const [args, words, env] of wrong) {
    const shown = JSON.stringify([...Object.values(env ?? {}), ...args]).replaceAll(here, "");
    test(`${shown}: one clear line, and status 1`, async () => {
      const program = startProgram(args, env);
      assert.equal(await program.exitStatus(), 1);
      assert.equal(program.out, "");
      assert.match(program.err, /^Cannot start: [^\n]+\n$/);
      assert.match(program.err, words);
    });
  }

  test("a port in use is named in one line", async () => {
    const port = listen({ hostname: "0.0.0.0" });
    const program = startProgram(["--port", `${port}`]);
    await assert.rejects(program.port());
    assert.equal(await program.exitStatus(), 1);
    assert.equal(
      program.err,
      `Cannot start: port ${port} is in use; try another --port (see --help)\n`,
    );
  });

  test("a key that does not belong to the certificate is told in one line", async () => {
    const [, cert] = certificate();
    const [, , , key] = certificate();
    const program = startProgram(["--port", "0", "--cert", cert, "--key", key]);
    assert.equal(await program.exitStatus(), 1);
    assert.match(program.err, /^Cannot start: the --key does not belong to the --cert [^\n]*\n$/);
  }, withoutOpenssl);

  test("--default NAME serves clients that offer no subprotocol", async () => {
    const raw = Raw.to(await startProgram(["--port", "0", "--default", "echo"]).port());
    raw.socket.write(handshake({ "Sec-WebSocket-Protocol": [] }));
    assert.equal((await raw.nextResponse())?.status, 101);
    assert.equal(await raw.ask("same"), "same");
  });

  test("--hostname '[::1]' is printed with one pair of brackets", async () => {
    const program = startProgram(["--port", "0", "--hostname", "[::1]"]);
    const port = await program.port();
    assert.equal(program.out, `Listening on http://[::1]:${port}/\n`);
  }, !networkInterfaces().lo?.some(({ family }) => family === "IPv6") && "without IPv6");

  test("on Deno, a PORT that may not be read is told in one line", async () => {
    const server = join(here, "server.ts");
    const program = new Program("deno", [
      "run",
      "--no-prompt",
      "--allow-net",
      server,
      "--hostname",
      "203.0.113.1",
    ], { PORT: "1" });
    await program.exitStatus();
    assert.match(program.err, /^PORT is not looked at: .*--allow-env=PORT\n/);
  }, !onDeno && "Bun may always read it");

  test("the port may come from PORT; --port comes first, empty is the same as none", async () => {
    const programs = [
      startProgram([], { PORT: "0" }),
      startProgram(["--port", "0"], { PORT: "1" }),
    ];
    for (const program of programs) await assertServes(await program.port());
  });

  test("--hostname is where it listens, and what it says", async () => {
    const program = startProgram(["--port", "0", "--hostname", "127.0.0.1"]);
    const port = await program.port();
    assert.equal(program.out, `Listening on http://127.0.0.1:${port}/\n`);
    await assertServes(port);
  });

  test("--help explains each option, whatever stands beside it", async () => {
    const program = startProgram(["--help", "--port", "x"]);
    assert.equal(await program.exitStatus(), 0);
    const names = ["port", "hostname", "default", "origin", "cert", "key", "quiet", "help"];
    for (const name of names) {
      assert.match(program.out, new RegExp(`--${name}\\b`));
    }
  });

  test("--origin lets in pages of these origins, and clients that send none", async () => {
    const origins = ["https://A.example:443/", "https://b.example:8443"];
    const args = origins.flatMap((origin) => ["--origin", origin]);
    const port = await startProgram(["--port", "0", ...args]).port();
    const expected: [string | string[], number][] = [
      ["https://a.example", 101],
      ["https://b.example:8443", 101],
      [[], 101],
      ["https://b.example", 403],
      ["http://a.example", 403],
      ["null", 403],
      ["", 403],
      [["https://a.example", "https://c.example"], 403],
    ];
    for (const [origin, status] of expected) {
      const answer = await request(port, handshake({ Origin: origin }));
      assert.equal(answer.status, status, `Origin: ${origin}`);
    }
  });

  test("--reuse-port lets two processes share a port", async () => {
    const port = await startProgram(["--port", "0", "--reuse-port"]).port();
    assert.equal(await startProgram(["--port", `${port}`, "--reuse-port"]).port(), port);
  }, process.platform !== "linux" && "for Linux");

  test("serve() takes what is undefined as not given", async () => {
    const port = listen({ hostname: undefined });
    await assertServes(port);
    await assert.rejects(once(connectTcp(port, "::1"), "connect"), "only at 0.0.0.0");
  });

  test("an unknown option of serve does not type-check", () => {
    // @ts-expect-error help is an option of the command line only
    assert.doesNotThrow(() => ({ help: true }) satisfies Options);
  });

  test("importing the module starts nothing", async () => {
    const code = `await import(${JSON.stringify(new URL("server.ts", import.meta.url))})`;
    const program = new Program(process.execPath, [onDeno ? "eval" : "-e", code]);
    assert.deepEqual([await program.exitStatus(), program.out, program.err], [0, "", ""]);
  });
});

describe("TLS", () => {
  test("with --cert and --key it speaks https and wss", async () => {
    const program = startProgram(["--port", "0", ...certificate()]);
    const port = await program.port();
    assert.equal(program.out, `Listening on https://localhost:${port}/\n`);

    const open = () => new Raw(connectTls({ port, host: "127.0.0.1", rejectUnauthorized: false }));
    const browser = open(), client = open();
    browser.socket.write("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert.equal((await browser.nextResponse())?.body, page);
    client.socket.write(handshake());
    assert.equal((await client.nextResponse())?.status, 101);
    assert.equal(await client.ask("secret"), "terces");
  }, withoutOpenssl);

  test("the page comes by HTTP/2, too, as browsers ask for it", async () => {
    const port = await startProgram(["--port", "0", ...certificate()]).port();
    const client = connectHttp2(`https://localhost:${port}`, { rejectUnauthorized: false });
    cleanups.push(() => client.destroy());
    const stream = client.request({ ":path": "/" });
    const [headers] = await once(stream, "response");
    assert.equal(headers[":status"], 200);
    assert.equal((await Array.fromAsync(stream)).join(""), page);
  }, withoutOpenssl);
});

// ---- Limits -------------------------------------------------------------------------------------

describe("limits", () => {
  const limit = limits.messageBytes;
  const split = (opcode: number, data: Buffer) => {
    const half = data.length >> 1;
    const rest = encodeFrame(CONTINUATION, data.subarray(half));
    return [encodeFrame(opcode, data.subarray(0, half), false), rest];
  };
  const sized: Record<string, (size: number) => Buffer[]> = {
    "text": (size) => [encodeFrame(TEXT, "é".repeat(size / 2) + "x".repeat(size % 2))],
    "bytes": (size) => [encodeFrame(BINARY, Buffer.alloc(size))],
    "text in fragments": (size) => split(TEXT, Buffer.alloc(size, "x")),
    "bytes in fragments": (size) => split(BINARY, Buffer.alloc(size)),
  };
  for (const [kind, frames] of Object.entries(sized)) {
    test(`1 MiB of ${kind} is answered, one byte more is closed with 1009`, async () => {
      const raw = await Raw.open(listen());
      raw.socket.write(Buffer.concat(frames(limit)));
      assert.equal((await raw.nextFrame())?.data.length, limit);
      raw.socket.write(Buffer.concat(frames(limit + 1)));
      assert.match(await raw.closeReason(), /^1009 ./);
    });
  }

  test("two servers in one process have limits of their own", async () => {
    const [small, large] = [listen({ limits: { messageBytes: 10 } }), listen()];
    const [first, second] = [await Raw.open(small), await Raw.open(large)];
    first.socket.write(encodeFrame(TEXT, "x".repeat(11)));
    assert.match(await first.closeReason(), /^1009 ./);
    assert.equal(await second.ask("x".repeat(11)), "x".repeat(11));
  });

  test("with messageBytes of 16 MiB, messages of 13 MB are answered one after the other", async () => {
    const raw = await Raw.open(listen({ limits: { messageBytes: 16 * 1024 * 1024 } }));
    const frame = encodeFrame(BINARY, Buffer.alloc(13_000_000));
    for (let i = 0; i < 2; i++) {
      raw.socket.write(frame);
      assert.equal((await raw.nextFrame())?.data.length, 13_000_000);
    }
  });

  test("with unreadBytes of 1, a client that waits for each reply is served", async () => {
    const raw = await Raw.open(listen({ limits: { unreadBytes: 1, allUnreadBytes: 1 } }));
    for (let i = 0; i < 100; i++) assert.equal(await raw.ask("ab"), "ba", `message ${i}`);
  });

  const wrongLimits: [keyof typeof limits, number, RegExp][] = [
    ["idleSeconds", 1000, /idleSeconds .* 8 to 960, not 1000/],
    ["idleSeconds", 7, /idleSeconds .* 8 to 960, not 7/],
    ["messageBytes", 0, /messageBytes .* from 1 to/],
    ["messageBytes", 64 * 1024 * 1024, /messageBytes .* from 1 to 67108863/],
    ["connections", 1.5, /connections .* whole number/],
    ["unreadBytes", NaN, /unreadBytes .* whole number/],
  ];
  for (const [name, value, message] of wrongLimits) {
    test(`limits.${name} of ${value} is refused with its range`, () => {
      assert.throws(() => serve({ port: 0, limits: { [name]: value } }), message);
    });
  }

  /** Keeps messages under way and reads slowly; gives the number of replies, or why it ended. */
  async function readSlowly(port: number, count: number, underWayBytes: number): Promise<string> {
    const raw = Raw.to(port);
    raw.socket.write(handshake());
    assert.equal((await raw.nextResponse())?.status, 101);
    const size = 1000;
    let sent = 0;
    let received = 0;
    const write = () => {
      const room = Math.floor(underWayBytes / size) - (sent - received);
      const frames = [];
      for (let i = 0; i < room && sent < count; i++, sent++) {
        frames.push(encodeFrame(TEXT, `${sent}`.padEnd(size)));
      }
      if (frames.length > 0) raw.socket.write(Buffer.concat(frames));
    };
    while (received < count) {
      write();
      const frame = await raw.nextFrame();
      if (!frame) return `cut after ${received}`;
      if (frame.opcode === CLOSE) return `closed with ${frame.data.readUInt16BE()}`;
      assert.equal(`${frame.data}`.trim(), `${received}`.split("").reverse().join(""));
      received++;
      if (received % 100 === 0) {
        raw.socket.pause();
        await sleep(5);
        raw.socket.resume();
      }
    }
    return `${received} replies`;
  }

  test("a steady reader with 4 MB under way gets every reply", async () => {
    const port = await startProgram(["--port", "0", "--quiet"]).port();
    assert.equal(await readSlowly(port, 15_000, 4_000_000), "15000 replies");
  });

  test(
    "on Bun, a steady reader with 20 MB under way gets every reply",
    async () => {
      const port = await startProgram(["--port", "0", "--quiet"]).port();
      assert.equal(await readSlowly(port, 25_000, 20_000_000), "25000 replies");
    },
    onDeno && "Deno cannot stop reading from a client",
  );

  test("on Bun, 50,000 messages at once are all answered", async () => {
    const messages = Array.from({ length: 50_000 }, (_, n) => `${n}`);
    const port = await startProgram(["--port", "0", "--quiet"]).port();
    const received = await replies(await connect(port), messages);
    assert.ok(received.every((reply, n) => reply === reverse(`${n}`)));
  }, onDeno && "Deno cannot stop reading from a client");

  test("300 messages of 64 KiB at once are all answered", async () => {
    const messages = Array(300).fill("x".repeat(65_536));
    const port = await startProgram(["--port", "0", "--quiet"]).port();
    assert.equal((await replies(await connect(port), messages)).length, 300);
  });

  test(
    "on-demand commands at once are all done, though their replies pass the limits",
    async () => {
      const port = listen({ limits: { unreadBytes: 4 * 1024 * 1024 } });
      const socket = await connect(port, "on-demand");
      const received = collect(socket, 20);
      for (let i = 0; i < 20; i++) socket.send("bytes 1000000");
      assert.equal((await received).length, 20);
    },
    onDeno && "Deno cannot stop reading from a client",
  );

  /** Sends messages until the connection is closed, without reading. */
  async function flood(port: number, name: string, size: number, isClosed: () => boolean) {
    const flooding = await Raw.open(port, name);
    const other = await Raw.open(port);
    flooding.socket.pause();
    const one = encodeFrame(BINARY, Buffer.alloc(size));
    const many = Buffer.concat(Array(size > 16 ? 4 : 5000).fill(one));
    for (let i = 0; !isClosed() && i < 500; i++) {
      flooding.socket.write(many);
      assert.equal(await other.ask("still here?"), "?ereh llits");
    }
    return flooding;
  }

  for (const size of [65_536, 16, 0]) {
    test(`on Deno, a client that floods ${size} bytes and does not read is closed`, async () => {
      let isClosed = false;
      const port = listenWith((connection) => {
        connection.onclose = () => void (isClosed = true);
        return (message) => message;
      }, { limits: { unreadBytes: 4 * 1024 * 1024 } });
      const flooding = await flood(port, "added", size, () => isClosed);
      assert.ok(isClosed, "it was not closed");
      await assertServes(port);
      flooding.socket.resume();
      assert.match(await flooding.closeReason(), /^1008 .|^cut$/);
    }, !onDeno && "Bun stops reading from it instead");
  }

  test(
    "on Bun, a client that floods and does not read is closed with 1008 after idleSeconds",
    async () => {
      const port = listen({ limits: { idleSeconds: 8 } });
      const flooding = await Raw.open(port);
      flooding.socket.pause();
      const many = Buffer.concat(Array(400).fill(encodeFrame(BINARY, Buffer.alloc(65_536))));
      flooding.socket.write(many);
      await sleep(10_000);
      await assertServes(port);
      flooding.socket.resume();
      assert.match(await flooding.closeReason(), /^1008 too many unread/);
    },
    onDeno && "Deno closes it at once",
  );

  test("on Deno, a client over the limit that goes on reading gets 1008, not a reset", async () => {
    const port = listen({ limits: { unreadBytes: 500_000 } });
    const raw = await Raw.open(port);
    raw.socket.write(Buffer.concat(Array(3000).fill(encodeFrame(TEXT, "x".repeat(1000)))));
    assert.equal(await raw.closeReason(), "1008 too many unread messages");
  }, !onDeno && "Bun stops reading from it instead");

  test("a handler that sends too much at once is closed with 1008", async () => {
    const port = listenWith((connection) => (message) => {
      for (let i = 0; i < 100; i++) connection.send(message);
    }, { limits: { unreadBytes: 1024 * 1024 } });
    const raw = await Raw.open(port, "added");
    raw.socket.pause();
    for (let i = 0; i < 10; i++) {
      raw.socket.write(encodeFrame(BINARY, Buffer.alloc(200_000)));
    }
    await sleep(200);
    raw.socket.resume();
    assert.match(await raw.closeReason(), /^1008 ./);
  });

  test("pushed messages that are not read close with 1008, and the client finds the reason", async () => {
    const ended = Promise.withResolvers<void>();
    let pushed = 0;
    const port = listenWith((connection) => {
      const timer = setInterval(() => {
        connection.send(new Uint8Array(1024 * 1024));
        pushed++;
      }, 5);
      connection.onclose = () => {
        clearInterval(timer);
        ended.resolve();
      };
    }, { limits: { unreadBytes: 8 * 1024 * 1024 } });
    const raw = await Raw.open(port, "added");
    raw.socket.pause();
    await ended.promise;
    assert.ok(pushed > 8 && pushed < 40, `${pushed} MiB, some of them in the kernel's buffers`);
    raw.socket.resume();
    assert.match(await raw.closeReason(), /^1008 ./);
  });

  test("over the limit of all clients together, one with a backlog is closed", async () => {
    let closed = 0;
    const port = listenWith((connection) => {
      connection.onclose = () => void closed++;
      const timer = setInterval(() => connection.send(new Uint8Array(1024 * 1024)), 10);
      const { onclose } = connection;
      connection.onclose = () => (clearInterval(timer), onclose());
    }, { limits: { allUnreadBytes: 8 * 1024 * 1024 } });
    const silent = await Promise.all([1, 2, 3, 4].map(() => Raw.open(port, "added")));
    for (const { socket } of silent) socket.pause();
    await eventually(() => {
      assert.ok(closed >= 3, `${closed} closed`);
      return Promise.resolve();
    }, "closed");
    await assertServes(port);
  });

  test("further handshakes are answered with 503 until a connection ends in any way", async () => {
    const port = listen({ limits: { connections: 3 } });
    const isNotFull = () => assertServes(port);
    const isFull = async () => {
      const { status, header } = await request(port, handshake());
      assert.deepEqual([status, Number(header("retry-after")[0]) > 0], [503, true]);
    };
    const ends: Record<string, (socket: Socket) => unknown> = {
      "a close frame": (socket) => socket.write(closeFrame(1000)),
      "the end of its stream": (socket) => socket.end(),
      "a reset": (socket) => socket.resetAndDestroy(),
      "a frame with all bits set": (socket) => socket.write(Buffer.alloc(20, 255)),
      "text that is not UTF-8": (socket) => socket.write(encodeFrame(TEXT, Uint8Array.of(255))),
    };
    const others = [await Raw.open(port), await Raw.open(port)];
    for (const [ending, end] of Object.entries(ends)) {
      const third = await Raw.open(port);
      await isFull();
      end(third.socket);
      others.push(await eventually(() => Raw.open(port), ending));
      await isFull();
      others.shift()!.socket.resetAndDestroy();
      await eventually(isNotFull, ending);
    }
  });

  test("on Deno, a client that was closed with 1009 counts until it has left", async () => {
    const port = listen({ limits: { connections: 1 } });
    const raw = await Raw.open(port);
    raw.socket.write(encodeFrame(BINARY, Buffer.alloc(limit + 1)));
    assert.match(await raw.closeReason(), /^1009 ./);
    assert.equal((await request(port, handshake())).status, 503);
    raw.socket.destroy();
    await eventually(() => assertServes(port), "its place is free");
  }, !onDeno && "Bun ends the connection itself");

  test("of many handshakes at once no more stay than there are places", async () => {
    const port = listen({ limits: { connections: 3 } });
    const crowd = Array.from({ length: 20 }, () => Raw.to(port));
    for (const { socket } of crowd) socket.write(handshake());
    const responses = await Promise.all(crowd.map((raw) => raw.nextResponse()));
    const open = crowd.filter((_, i) => responses[i]?.status === 101);
    const replies = await Promise.all(open.map((raw) => raw.ask("stay")));
    assert.equal(replies.filter((reply) => reply === "yats").length, 3);
    await eventually(async () => {
      assert.equal((await request(port, handshake())).status, 503);
    }, "full");
  });

  test("a peer that answers no pings is let go, and its place; a living one stays", async () => {
    const port = listen({ limits: { idleSeconds: 8, connections: 3 } });
    const living = await connect(port);
    const dead = await Raw.open(port);
    const hasty = Raw.to(port);
    hasty.socket.write(handshake(), () => hasty.socket.resetAndDestroy());
    await dead.closeReason();
    await eventually(() => Raw.open(port), "the place of the dead one is free");
    await eventually(() => Raw.open(port), "the place of the one that left at once is free");
    assert.equal((await request(port, handshake())).status, 503, "but each only once");
    assert.deepEqual(await replies(living, ["alive"]), ["evila"]);
  });
});

// ---- Failures -----------------------------------------------------------------------------------

describe("a subprotocol that fails", () => {
  const lines = `
    const fail = (what: string) => { throw new Error(what); };
    const unprintable = new Proxy({}, { get() { throw new Error("hidden"); } });
    Object.assign(subprotocols, {
      "message-throws": () => () => fail("thrown in message"),
      "open-throws": () => fail("thrown in open"),
      "throws-the-unprintable": () => () => { throw unprintable; },
      "close-throws": (connection: Connection) => { connection.onclose = () => fail("thrown in close"); },
      "repeats": () => (message: Message) => fail(String(message)),
      "is-async": () => async (message: Message) => message,
      "opens-async": async () => {},
      "rejects": () => async () => fail("rejected at once"),
      "gives-a-number": () => () => 5,
      "timer-throws": () => void setTimeout(() => fail("thrown by a timer")),
      "long-reason": (connection: Connection) => connection.close(1000, "é".repeat(62)),
      "promise-rejects": () => void Promise.reject(new Error("rejected later")),
    });`;
  const failures: Record<string, RegExp> = {
    "message-throws": /^ +Error: thrown in message\n +at .*server\.ts/m,
    "open-throws": /^ +Error: thrown in open\n +at .*server\.ts/m,
    "throws-the-unprintable": /failed/,
    "is-async": /TypeError: .* must not be async/,
    "opens-async": /TypeError: .* must not be async/,
    "rejects": /TypeError: .* must not be async/,
    "gives-a-number": /TypeError: a message must be a string or a Uint8Array/,
    "long-reason": /RangeError: .*123 bytes/,
  };

  for (const [name, pattern] of Object.entries(failures)) {
    test(`(${name}) costs its own connection, with 1011, and nobody else anything`, async () => {
      const program = startEdited(lines, ["--quiet"]);
      const port = await program.port();
      const other = await Raw.open(port);
      const raw = await Raw.open(port, name);
      raw.socket.write(encodeFrame(TEXT, "a\nb"));
      assert.match(await raw.closeReason(), /^1011 ./);
      await program.reports(pattern);
      const [report] = program.err.match(/^failed: .*$/m)!;
      assert.ok(report.startsWith(`failed: 127.0.0.1:${raw.socket.localPort}, ${name}`), report);
      const failsInOpen = name === "open-throws" || name === "opens-async" ||
        name === "long-reason";
      assert.equal(report.includes("message: a\\u000ab"), !failsInOpen, report);
      assert.equal(await other.ask("serving"), "gnivres");
    });
  }

  test("with the text of a client can neither steer the terminal nor forge a report", async () => {
    const program = startEdited(lines);
    const raw = await Raw.open(await program.port(), "repeats");
    raw.socket.write(encodeFrame(TEXT, "\x1b[2J\nfailed: forged\x9b"));
    assert.match(await raw.closeReason(), /^1011 ./);
    await program.reports(/at /);
    assert.match(program.err, /\\u001b\[2J\n +failed: forged\\u009b\n/);
    assert.equal(program.err.match(/^failed: /gm)?.length, 1);
  });

  test("logs the message and the failure before the end of the connection", async () => {
    const program = startEdited(lines);
    const raw = await Raw.open(await program.port(), "message-throws");
    raw.socket.write(encodeFrame(TEXT, "boom"));
    await raw.closeReason();
    await program.prints(/^closed: .*, code 1011$/m);
    assert.match(program.out, /^connected: .*\nreceived data: boom, failing\nclosed: /m);
  });

  for (const name of ["close-throws", "timer-throws", "promise-rejects"]) {
    test(`elsewhere (${name}) is reported and ends nothing`, async () => {
      const program = startEdited(lines);
      const port = await program.port();
      const other = await Raw.open(port);
      (await Raw.open(port, name)).socket.end();
      await program.reports(/(thrown|rejected) .*\n +at /);
      assert.equal(await other.ask("serving"), "gnivres");
    });
  }

  test("again and again fills the error log with no more than 100 lines in 0.1 s", async () => {
    const program = startEdited(lines, ["--quiet"]);
    const port = await program.port();
    const clients = await Promise.all(
      Array.from({ length: 300 }, () => Raw.open(port, "message-throws")),
    );
    for (const { socket } of clients) socket.write(encodeFrame(TEXT, "x"));
    await Promise.all(clients.map((raw) => raw.closeReason()));
    await assertServes(port);
    await eventually(() => {
      const shown = program.err.match(/^failed: /gm)?.length ?? 0;
      const counted = [...program.err.matchAll(/^\((\d+) more lines\)$/gm)];
      const skipped = counted.reduce((sum, [, n]) => sum + Number(n), 0);
      assert.equal(shown + skipped, 300);
      return Promise.resolve();
    }, "all counted");
  });
});

describe("hostile clients", () => {
  const next = randomNumbers(11);
  const bytes = (n: number) => Buffer.from(Array.from({ length: n }, () => next(256)));
  const damaged = (data: Buffer) => {
    for (let i = 0; i < 3; i++) data[next(data.length)] = next(256);
    return data;
  };
  const attacks: Record<string, () => Buffer> = {
    "random bytes": () => bytes(next(2000)),
    "half a request": () => Buffer.from(handshake().slice(0, next(200))),
    "a damaged request": () => damaged(Buffer.from(handshake())),
    "a header with a byte that is no blank": () =>
      Buffer.from(handshake({ Upgrade: "\xa0websocket", Connection: "\xa0Upgrade" }), "latin1"),
    "a long header": () => Buffer.from(handshake({ "X-Long": "x".repeat(next(200_000)) })),
    "random frames": () => Buffer.concat([Buffer.from(handshake()), bytes(next(2000))]),
    "a damaged frame": () =>
      Buffer.concat([Buffer.from(handshake()), damaged(encodeFrame(next(16), bytes(next(200))))]),
    "half a frame": () =>
      Buffer.concat([
        Buffer.from(handshake()),
        encodeFrame(TEXT, "x".repeat(70_000)).subarray(0, next(70_000)),
      ]),
    "many pings": () =>
      Buffer.concat([Buffer.from(handshake()), ...Array(next(2000)).fill(encodeFrame(PING, "x"))]),
  };
  for (const [what, make] of Object.entries(attacks)) {
    test(`that send ${what} and leave in any way end nothing`, async () => {
      const port = listen();
      const other = await Raw.open(port);
      for (let i = 0; i < 10; i++) {
        await Promise.all(Array.from({ length: 10 }, async () => {
          const { socket } = Raw.to(port);
          const sent = new Promise((resolve) => socket.write(make(), resolve));
          await Promise.race([sent, once(socket, "close")]);
          if (next(2)) socket.resetAndDestroy();
          else socket.end();
        }));
      }
      assert.equal(await other.ask("serving"), "gnivres");
      await assertServes(port);
    });
  }

  test("that use up all file descriptors end nothing, nor the open connections", async () => {
    const args = [...runtimeArgs, join(here, "server.ts"), "--port", "0", "--quiet"];
    const shell = ["-c", 'ulimit -n 60; exec "$0" "$@"', process.execPath, ...args];
    const program = new Program("sh", shell);
    const port = await program.port();
    const other = await Raw.open(port);
    const crowd = Array.from({ length: 100 }, () => Raw.to(port));
    const answers = crowd.map((raw) => (raw.socket.write(handshake()), raw.nextResponse()));
    await Promise.any(answers.map(async (answer) => assert.equal((await answer)?.status, 101)));
    assert.equal(await other.ask("serving"), "gnivres");
    for (const { socket } of crowd) socket.destroy();
    const answered = (await Promise.all(answers)).filter((answer) => answer?.status === 101);
    assert.ok(answered.length < 100, "the limit was reached");
    await eventually(() => assertServes(port));
    assert.equal(await other.ask("serving"), "gnivres");
  }, process.platform !== "linux" && "for Linux");
});

// ---- The end ------------------------------------------------------------------------------------

describe("the end", () => {
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    test(`${signal}: all clients get 1001, and the exit status is 0`, async () => {
      const program = startProgram(["--port", "0"]);
      const port = await program.port();
      const [silent, half] = [await Raw.open(port), Raw.to(port)];
      half.socket.write("GET / HTTP/1.1\r\n");
      const socket = await connect(port);
      const closed = once(socket, "close");
      program.signal(signal);
      const [{ code, reason }] = await closed;
      assert.equal(code, 1001);
      assert.equal(reason, "the server is stopping");
      assert.equal(await silent.closeReason(), "1001 the server is stopping");
      assert.equal(await program.exitStatus(), 0);
      assert.equal(program.out.match(/code 1001/g)?.length, 2);
      assert.equal(program.err, "");
    });
  }

  test("a second signal at once is the same wish", async () => {
    const program = startProgram(["--port", "0"]);
    const raw = await Raw.open(await program.port());
    program.signal("SIGINT");
    program.signal("SIGINT");
    assert.equal(await raw.closeReason(), "1001 the server is stopping");
    assert.equal(await program.exitStatus(), 0);
  });

  test("a second signal after more than half a second ends it at once", async () => {
    const program = startProgram(["--port", "0"]);
    await Raw.open(await program.port()); // it does not answer the close frame
    program.signal("SIGTERM");
    await sleep(700);
    program.signal("SIGTERM");
    assert.equal(await program.exitStatus(), 1);
  }, !onDeno && "Bun does not wait for the clients, so it has stopped before");

  test("stop() closes the connections with 1001 and frees the port", async () => {
    const server = serve({ port: 0, hostname: "127.0.0.1", quiet: true });
    const raw = await Raw.open(server.port);
    await server.stop();
    assert.equal(await raw.closeReason(), "1001 the server is stopping");
    await assertServes(listen({ port: server.port }));
  });
});

// ---- The page --------------------------------------------------------------------------------

/** The little of Bun's browser that is needed. */
interface View {
  navigate(url: string): Promise<void>;
  evaluate(script: string): Promise<unknown>;
  cdp(method: string, parameters?: object): Promise<unknown>;
  type(text: string): Promise<void>;
  press(key: string, options?: { modifiers: string[] }): Promise<void>;
  click(selector: string): Promise<void>;
  resize(width: number, height: number): Promise<void>;
  close(): void;
}
const { Bun: bun } = globalThis as { Bun?: { WebView: new (options: object) => View } };
const chromium = process.env.CHROMIUM ?? "/usr/bin/chromium";

const silence: Subprotocol = () => () => {};

/** Subprotocols that never reply. */
const mute = { [NAME]: silence, chat: silence };

/** Opens a page in Chromium. */
async function browse(url: string): Promise<View> {
  const switches = ["no-sandbox", "disable-background-networking", "disable-component-update"];
  const argv = [...switches, "disable-sync", "ignore-certificate-errors"].map((s) => `--${s}`);
  const view = new bun!.WebView({ backend: { type: "chrome", url: false, path: chromium, argv } });
  cleanups.push(() => view.close());
  await view.navigate(url);
  return view;
}

/** Opens the page of a new server, and waits until it is connected. */
async function browseConnected(query = "", options: Options = {}): Promise<View> {
  const view = await browse(`http://localhost:${listen(options)}/${query}`);
  await shows(view, state("connected"));
  return view;
}

/** Waits until all of some expressions hold in the page, at most for 15 s. */
async function shows(view: View, ...expressions: string[]): Promise<void> {
  const expression = expressions.map((part) => `(${part})`).join(" && ");
  const text = await view.evaluate(`new Promise((resolve) => {
    const start = performance.now();
    const look = () => {
      if (${expression}) resolve("as expected");
      else if (performance.now() - start > 15_000) resolve(document.body.innerText);
      else setTimeout(look, 20);
    };
    look();
  })`);
  assert.equal(text, "as expected", expression);
}

/** Types a message and presses Enter. */
async function enter(view: View, message: string): Promise<void> {
  await view.type(message);
  await view.press("Enter");
}

/** Sends a message that cannot be typed. */
async function submit(view: View, message: string): Promise<void> {
  await view.evaluate(`message.value = ${message}, form.requestSubmit()`);
}

/** Fills in the fields of Connection and presses Connect or Close. */
async function use(view: View, button: "connect" | "close", fields: object): Promise<void> {
  await view.evaluate("connection.open = true");
  for (const [id, value] of Object.entries(fields)) {
    await view.evaluate(`document.getElementById("${id}").value = ${JSON.stringify(value)}`);
  }
  await view.evaluate(`document.getElementById("${button}").click()`);
}

const textOf = (id: string) => `document.getElementById("${id}").textContent`;
const includes = (id: string, words: string) => `${textOf(id)}.includes(${JSON.stringify(words)})`;
const state = (name: string) => `document.body.dataset.state === "${name}"`;
const status = (words: string) => includes("status", words);
const notice = (words: string) => `${textOf("notice")} === ${JSON.stringify(words)}`;
const logged = (words: string) => includes("log", words);
const color = `getComputedStyle(document.querySelector("header")).backgroundColor`;
const green = `${color} === "rgb(92, 203, 107)"`;
const amber = `${color} === "rgb(255, 191, 0)"`;
const red = `${color} === "rgb(255, 92, 85)"`;

/** Some row matches. */
const row = (pattern: RegExp) =>
  `[...log.children].some((row) => ${pattern}.test(row.textContent))`;
/** The number of rows that match. */
const rows = (pattern: RegExp) =>
  `[...log.children].filter((row) => ${pattern}.test(row.textContent)).length`;

/** What the page gives to console.log from now on, as one string. */
const recordConsole =
  `globalThis.printed = "", console.log = (...parts) => printed += parts + "\\n"`;

/** Counts the changes of the status, and sums up the layout shift, from now on. */
const observe = `(() => {
  globalThis.statusChanges = 0;
  globalThis.layoutShift = 0;
  const options = { childList: true, characterData: true, subtree: true };
  const changed = () => globalThis.statusChanges++;
  new MutationObserver(changed).observe(document.getElementById("status"), options);
  new PerformanceObserver((list) => {
    for (const { value } of list.getEntries()) globalThis.layoutShift += value;
  }).observe({ type: "layout-shift" });
})()`;

const fieldTop = "message.getBoundingClientRect().top + scrollY";

if (bun) {
  describe("the page", () => {
    const missing = without(chromium, existsSync(chromium));
    const pageTest = (name: string, run: () => Promise<void>, timeout = 60_000) =>
      it(name, { timeout, skip: missing }, run);

    // ---- The log

    pageTest("shows a message and its reply in one row each", async () => {
      const view = await browseConnected();
      await enter(view, "Hello, world!");
      await shows(view, row(/→.*Hello, world!.*13 bytes.*\d\d:\d\d:\d\d/));
      await shows(view, row(/←.*!dlrow ,olleH.*13 bytes.*\d\d:\d\d:\d\d.*\d ms/));
      await shows(view, `${rows(/[→←]/)} === 2`);
    });

    pageTest("shows a round trip on the reply's row only", async () => {
      const view = await browseConnected("?protocol=echo");
      await enter(view, "Hello");
      await shows(view, row(/←.*Hello.* ms/), `${rows(/→.* ms/)} === 0`);
    });

    pageTest("shows a pushed message as received, with no round trip", async () => {
      const view = await browseConnected("?protocol=count");
      await enter(view, "reset");
      await shows(view, row(/←.* 1 .*1 byte /), `${rows(/←.* 1 /)} >= 2 || ${row(/←.* 2 /)}`);
      await shows(view, `${rows(/ ms/)} === 0`, "log.querySelector('.wrong') === null");
    });

    pageTest("shows each message once to both members of a chat", async () => {
      const port = listen();
      const views = [];
      for (let i = 0; i < 2; i++) {
        views.push(await browse(`http://localhost:${port}/?protocol=chat`));
        await shows(views[i], state("connected"));
      }
      await enter(views[0], "hello all");
      await shows(views[0], `${rows(/→.*hello all/)} === 1`, `${rows(/←.*hello all/)} === 1`);
      await shows(views[1], `${rows(/→/)} === 0`, `${rows(/←.*hello all/)} === 1`);
      await shows(views[0], `${rows(/ ms/)} === 0`);
    });

    pageTest("tells a racecar's reply, and an empty message's, from what was sent", async () => {
      const view = await browseConnected();
      await enter(view, "racecar");
      await shows(view, row(/→.*racecar/), row(/←.*racecar/));
      await view.press("Enter");
      await shows(view, row(/→.*0 bytes/), row(/←.*0 bytes/), logged("(empty)"));
    });

    pageTest("shows messages as text, never as markup, the newest first", async () => {
      const view = await browseConnected();
      await enter(view, "<b>bold</b><script>document.title = 1</script>");
      await shows(view, logged("<b>bold</b>"), logged(">b/<dlob>b<"));
      await shows(view, "log.querySelector('b, script') === null", "document.title !== '1'");
      await enter(view, "last");
      await shows(view, logged("tsal"));
      const top = (name: string) => `log.${name}.getBoundingClientRect().top`;
      await shows(view, `${top("lastElementChild")} < ${top("firstElementChild")}`);
      await shows(view, `${top("lastElementChild")} + 30 < innerHeight`, "scrollY === 0");
    });

    pageTest("shows control characters and bidi controls as escapes", async () => {
      const view = await browseConnected("?protocol=echo");
      await submit(view, `"a\\tb\\nc\\u0007\\u202ed"`);
      await shows(view, row(/→.*a\\tb\\nc\\u0007\\u202ed/), row(/←.*a\\tb\\nc\\u0007\\u202ed/));
    });

    pageTest("shows a lone surrogate as what is sent for it, U+FFFD", async () => {
      const view = await browseConnected("?protocol=echo");
      await submit(view, `"a\\ud800b"`);
      await shows(view, row(/→.*a\ufffdb.*5 bytes/), row(/←.*a\ufffdb.*5 bytes/));
    });

    pageTest("shows the beginning of a long message, without half a character", async () => {
      const view = await browseConnected("?protocol=echo");
      await submit(view, `"a" + "😀".repeat(1000)`);
      await shows(view, row(/←.*a(😀)+ …/u), row(/←.*4,001 bytes/), `!${logged("\ud83d …")}`);
    });

    pageTest("clips piled up combining marks at their row", async () => {
      const view = await browseConnected();
      await submit(view, `"Z" + "\\u0301".repeat(90)`);
      const clips = "[...log.children].every((row) => getComputedStyle(row).overflowY === 'clip')";
      await shows(view, row(/→.*Z/), clips);
    });

    pageTest("has the accessibility tree read direction, text, size, time", async () => {
      const view = await browseConnected();
      await enter(view, "Hello, world!");
      await shows(view, row(/←.*!dlrow/));
      const { nodes } = await view.cdp("Accessibility.getFullAXTree") as { nodes: Node[] };
      type Node = Record<"role" | "name", { value: string } | undefined> & {
        nodeId: string;
        ignored: boolean;
        childIds: string[];
      };
      const read = ({ role, name, childIds }: Node): string[] => {
        if (role?.value === "StaticText") return [name?.value.trim() ?? ""];
        return childIds.flatMap((id) => read(nodes.find(({ nodeId }) => nodeId === id)!));
      };
      const log = nodes.find(({ role }) => role?.value === "log")!;
      assert.equal(log.name?.value, "Messages");
      const words = read(log).filter(Boolean).join(" | ");
      assert.match(words, /sent \| Hello, world! \| 13 bytes \| \d\d:\d\d:\d\d/);
      assert.match(words, /received \| !dlrow ,olleH \| 13 bytes \| \d\d:\d\d:\d\d \| in .* ms/);
      assert.doesNotMatch(words, /[→←]/);
    });

    pageTest("never changes a row, so that each is announced once", async () => {
      const view = await browseConnected();
      await view.evaluate(`(() => {
        globalThis.changes = 0;
        const options = { childList: true, characterData: true, attributes: true, subtree: true };
        const count = (records) => changes += records.filter(({ target }) => target !== log).length;
        new MutationObserver(count).observe(log, options);
      })()`);
      await enter(view, "one");
      await enter(view, "two");
      await shows(view, row(/←.*eno/), row(/←.*owt/), "changes === 0");
    });

    pageTest("keeps its newest 200 rows", async () => {
      const view = await browseConnected();
      await view.evaluate(`(() => {
        for (let i = 0; i < 300; i++) {
          message.value = "number " + i;
          form.requestSubmit();
        }
      })()`);
      await shows(view, logged("992 rebmun"), "log.children.length === 200");
    });

    // ---- Connecting

    pageTest("is green and says where it is connected", async () => {
      const port = listen();
      const view = await browse(`http://localhost:${port}/`);
      await shows(view, state("connected"), green, status(`ws://localhost:${port}/`), status(NAME));
      await shows(view, row(/Connected to ws:/), "document.activeElement === message");
    });

    pageTest("is amber while a server named by ?server= is silent", async () => {
      const address = `ws://127.0.0.1:${await listenSilently()}/any/path`;
      const view = await browse(`http://localhost:${listen()}/?server=${address}`);
      await shows(view, state("connecting"), amber, status(`Connecting to ${address}`));
    });

    pageTest("connects to the server of ?server= with the subprotocol of ?protocol=", async () => {
      const address = `ws://127.0.0.1:${listen()}/any/path`;
      const view = await browse(`http://localhost:${listen()}/?server=${address}&protocol=echo`);
      await shows(view, state("connected"), status("/any/path"), status("echo"));
      await shows(view, `address.value === "${address}"`, "protocol.value === 'echo'");
    });

    pageTest("talks to a plain echo with an empty ?protocol=", async () => {
      const view = await browseConnected("?protocol=", { defaultSubprotocol: "echo" });
      await enter(view, "Hello");
      await shows(view, row(/→.*Hello/), row(/←.*Hello/), `${rows(/ ms/)} === 0`);
      await shows(view, status("no subprotocol"));
    });

    pageTest("stays red and explains when a server refuses the subprotocol", async () => {
      const view = await browse(`http://localhost:${listen()}/?protocol=unknown`);
      await shows(view, state("failed"), red, row(/No connection.*does not tell a page.*1006/));
      await shows(view, "log.querySelector('.wrong') !== null");
    });

    pageTest("logs the whole reason, however long the address is", async () => {
      const path = "long".repeat(100);
      const view = await browse(`http://localhost:${listen()}/?protocol=unknown&${path}`);
      await shows(
        view,
        state("failed"),
        logged(path),
        logged("does not tell a page which, code 1006"),
      );
    });

    pageTest("opens Connection and explains when the address is wrong", async () => {
      const port = listen();
      for (const wrong of ["nonsense", "", "ftp://localhost/"]) {
        const view = await browse(`http://localhost:${port}/?server=${wrong}`);
        await shows(view, state("failed"), red, "connection.open");
        await shows(view, includes("addressError", `“${wrong}” is not usable`));
        await use(view, "connect", { address: `ws://localhost:${port}/` });
        await shows(view, state("connected"), `${textOf("addressError")} === ""`);
        view.close();
      }
    });

    pageTest("keeps Connection closed while nothing is wrong, with five suggestions", async () => {
      const view = await browseConnected();
      await shows(view, "!connection.open", "!wire.open", "!times.open");
      const names = await view.evaluate("[...protocols.options].map(({ value }) => value).join()");
      assert.equal(names, `${NAME},echo,count,chat,on-demand`);
    });

    pageTest("connects to another server and subprotocol with Connect", async () => {
      const other = listen();
      const view = await browseConnected();
      await use(view, "connect", { address: `ws://localhost:${other}/`, protocol: "echo" });
      await shows(view, state("connected"), status(`ws://localhost:${other}/`), status("echo"));
      await enter(view, "Hello");
      await shows(view, row(/This page closed the connection/), row(/←.*Hello/));
    });

    pageTest("uses wss where it came by https", async () => {
      const port = await startProgram(["--port", "0", ...certificate()]).port();
      const view = await browse(`https://localhost:${port}/`);
      await shows(view, state("connected"), status(`wss://localhost:${port}/`));
    });

    pageTest("finds its server behind a proxy under any path", async () => {
      const port = await listenUnderPath("/under/a/path/", listen());
      const view = await browse(`http://localhost:${port}/under/a/path/`);
      await shows(view, state("connected"), status(`ws://localhost:${port}/under/a/path/`));
    });

    pageTest("works with a server on Deno, too", async () => {
      const args = ["run", "--no-prompt", "--allow-net", join(here, "server.ts"), "--port", "0"];
      const view = await browse(`http://localhost:${await new Program("deno", args).port()}/`);
      await shows(view, state("connected"), green);
      await enter(view, "Hello, world!");
      await shows(view, row(/←.*!dlrow ,olleH.* ms/));
    });

    pageTest("uses ws://localhost:9000/ where it was opened as a file", async () => {
      const view = await browse(new URL("index.html", import.meta.url).href);
      await shows(view, `address.value === "ws://localhost:9000/"`, status("ws://localhost:9000/"));
    });

    // ---- Closing

    pageTest("closes with a code and a reason, and stays closed", async () => {
      const view = await browseConnected();
      await use(view, "close", { code: "4001", reason: "bye" });
      await shows(view, state("closed"), `!(${red})`, row(/This page closed.*4001.*bye/));
      await sleep(1000); // the first new try would come after 250 ms
      await shows(view, state("closed"), "log.querySelector('.wrong') === null");
      await use(view, "connect", {});
      await shows(view, state("connected"), green);
    });

    pageTest("refuses a code that a page may not use, and a reason that is too long", async () => {
      const view = await browseConnected();
      for (const code of ["999", "1001", "2999", "5000", "3000.5", "", "x"]) {
        await use(view, "close", { code });
        await shows(view, includes("closeError", "1000 or 3000 to 4999"), state("connected"));
      }
      await use(view, "close", { code: "3000", reason: "é".repeat(62) });
      await shows(view, includes("closeError", "123 bytes"), state("connected"));
      await use(view, "close", { reason: `${"é".repeat(61)}x` });
      await shows(view, state("closed"), `${textOf("closeError")} === ""`);
    });

    pageTest("ends the tries with Close while there is no server", async () => {
      const server = startServer();
      const view = await browse(`http://localhost:${server.port}/`);
      await shows(view, state("connected"));
      await server.stop();
      await shows(view, state("lost"), red);
      await use(view, "close", {});
      await shows(view, state("closed"), row(/stopped trying/));
      startServer({ port: server.port });
      await sleep(1500);
      await shows(view, state("closed"));
    });

    pageTest(
      "takes a later loss for a loss, after Close and Connect while connecting",
      async () => {
        const server = startServer();
        const silent = await listenSilently();
        const view = await browse(
          `http://localhost:${server.port}/?server=ws://127.0.0.1:${silent}/`,
        );
        await shows(view, state("connecting"));
        const address = `ws://localhost:${server.port}/`;
        await view.evaluate(`(() => {
        document.getElementById("close").click();
        document.getElementById("address").value = "${address}";
        connect.click();
      })()`);
        await shows(view, state("connected"));
        await server.stop();
        await shows(view, state("lost"), red);
      },
    );

    pageTest("takes a server's clean 1000 for no failure, and does not connect again", async () => {
      const view = await browseConnected("?protocol=on-demand");
      await enter(view, "close 1000 bye");
      await shows(view, state("closed"), `!(${red})`, row(/The server closed.*1000.*bye/));
      await sleep(1000);
      await shows(view, state("closed"), "log.querySelector('.wrong') === null");
    });

    pageTest("shows another code as an abnormal end, and connects again", async () => {
      const view = await browseConnected("?protocol=on-demand");
      await enter(view, "close 4001 bye");
      await shows(view, row(/Connection lost.*4001.*bye/), row(/Connected again/), green);
      await shows(view, "log.querySelectorAll('.wrong').length === 1");
    });

    pageTest("explains a message too big, and connects again without it", async () => {
      const view = await browseConnected();
      await submit(view, `"x".repeat(1024 * 1024 + 1)`);
      await shows(view, row(/Connection lost.*(1009|1006).*Messages without a reply: 1/));
      await shows(view, row(/Connected again/), state("connected"));
    });

    pageTest("connects again with growing pauses to a server that closes each time", async () => {
      const view = await browse(
        `http://localhost:${
          listen({ subprotocols: { [NAME]: (connection) => connection.close(1011, "not now") } })
        }/`,
      );
      await shows(view, `${rows(/Connection lost.*1011/)} >= 3`);
      await sleep(2000);
      await shows(view, `${rows(/Connection lost/)} <= 5`);
    });

    pageTest("says that the server is lost, keeps what is typed, and sends it later", async () => {
      const server = startServer();
      const view = await browse(`http://localhost:${server.port}/`);
      await shows(view, state("connected"));
      await server.stop();
      await shows(view, state("lost"), red, row(/Connection lost.*code 10/));
      await enter(view, "meanwhile");
      await enter(view, "and again");
      await shows(view, notice("2 messages waiting"), `${rows(/→/)} === 0`);
      startServer({ port: server.port });
      await shows(view, state("connected"), green, row(/Connected again/), notice(""));
      await shows(view, row(/→.*meanwhile/), row(/←.*elihwnaem/), row(/←.*niaga dna/));
    });

    pageTest("says when a reply is due for 5 s, and stays green", async () => {
      const view = await browseConnected("", { subprotocols: mute });
      await enter(view, "Hello");
      await shows(view, row(/→.*Hello/), notice(""));
      await shows(view, notice("No reply for 5 s"), green);
    });

    pageTest("expects no reply where none belongs to a message", async () => {
      const view = await browseConnected("?protocol=chat", { subprotocols: mute });
      await enter(view, "Hello");
      await sleep(6000);
      await shows(view, notice(""));
    });

    // ---- The header and the message field do not move

    for (const width of [320, 390, 900]) {
      pageTest(`moves nothing in 30 s without a server, ${width} pixels wide`, async () => {
        const server = startServer();
        const view = await browse(`http://localhost:${server.port}/`);
        await view.resize(width, 700);
        await shows(view, state("connected"), `innerWidth === ${width}`);
        await submit(view, `"Hello"`);
        await shows(view, row(/←/));
        await sleep(1000);
        const top = await view.evaluate(fieldTop);
        await view.evaluate(observe);
        await server.stop();
        await sleep(30_000);
        await shows(view, red, "layoutShift < 0.1", "statusChanges <= 3", `${fieldTop} === ${top}`);
        await shows(view, "statusChanges >= 1");
      }, 60_000);
    }

    pageTest("keeps the message field in its place in every state", async () => {
      const server = startServer();
      const view = await browse(`http://localhost:${server.port}/`);
      await view.resize(320, 600);
      await shows(view, state("connected"));
      const top = await view.evaluate(fieldTop);
      const stays = `${fieldTop} === ${top}`;
      await submit(view, `"Hello"`);
      await shows(view, row(/←/), stays);
      await view.evaluate("hex.checked = true");
      await submit(view, `"xy"`);
      await shows(view, `${textOf("error")} !== ""`, stays);
      await use(view, "connect", { address: "nonsense" });
      await shows(view, state("failed"), stays);
      const address = `ws://127.0.0.1:${await listenSilently()}/${"long".repeat(100)}`;
      await use(view, "connect", { address });
      await shows(view, state("connecting"), stays);
      await use(view, "close", {});
      await shows(view, state("closed"), stays);
      await view.evaluate("message.value = 'one\\ntwo\\nthree'");
      await shows(view, stays, "message.offsetHeight > 60");
    });

    pageTest("shows a usable message field 320 pixels wide with text at 200 %", async () => {
      const view = await browseConnected();
      await view.resize(320, 568);
      await view.evaluate("document.documentElement.style.fontSize = '200%'");
      await shows(view, "document.documentElement.scrollWidth <= 320", "message.offsetWidth > 200");
      await shows(view, "message.getBoundingClientRect().bottom < innerHeight", "scrollY === 0");
    });

    for (const [width, height] of [[320, 256], [320, 180]]) {
      pageTest(`shows the message field at 400 % zoom, ${width} × ${height} pixels`, async () => {
        const view = await browseConnected();
        await view.resize(width, height);
        await shows(view, `innerHeight === ${height}`, "document.body.scrollWidth <= 320");
        await shows(view, "message.getBoundingClientRect().bottom < innerHeight", "scrollY === 0");
        await shows(view, "message.offsetWidth > 200");
      });
    }

    // ---- The message field

    pageTest("sends with Enter, and starts a line with Shift+Enter", async () => {
      const view = await browseConnected("?protocol=echo");
      await view.type("one");
      await view.press("Enter", { modifiers: ["Shift"] });
      await view.type("two");
      await shows(view, "message.value === 'one\\ntwo'", `${rows(/→/)} === 0`);
      await view.press("Enter");
      await shows(view, row(/→.*one\\ntwo.*7 bytes/), row(/←.*one\\ntwo/), "message.value === ''");
    });

    pageTest("leaves Enter to an input method while it composes", async () => {
      const view = await browseConnected();
      await view.evaluate(`(() => {
        message.value = "かな";
        const options = { key: "Enter", isComposing: true, bubbles: true, cancelable: true };
        globalThis.untouched = message.dispatchEvent(new KeyboardEvent("keydown", options));
      })()`);
      await shows(view, "untouched", "message.value === 'かな'", `${rows(/→/)} === 0`);
    });

    pageTest("brings back what was sent with arrow-up, and goes on with arrow-down", async () => {
      const view = await browseConnected();
      await enter(view, "first");
      await enter(view, "second");
      await view.press("ArrowUp");
      await shows(view, "message.value === 'second'");
      await view.press("ArrowUp");
      await view.press("ArrowUp");
      await shows(view, "message.value === 'first'");
      await view.press("ArrowDown");
      await shows(view, "message.value === 'second'");
      await view.press("ArrowDown");
      await shows(view, "message.value === ''");
    });

    pageTest("keeps with arrow-up what is being typed", async () => {
      const view = await browseConnected();
      await enter(view, "first");
      await view.type("second");
      await view.press("ArrowUp");
      await shows(view, "message.value === 'second'");
    });

    pageTest("returns the focus to the message field after Send", async () => {
      const view = await browseConnected();
      await view.type("Hello");
      await view.click("#send");
      await shows(view, row(/←.*olleH/), "document.activeElement === message");
    });

    pageTest("takes hex bytes in the usual spellings", async () => {
      const view = await browseConnected("?protocol=echo");
      await view.click("#hex");
      const spellings = ["01 02fF", "0102FF", "0x01, 0x02, 0xff", "0x1,0x2,0xff", "01:02:ff"];
      for (
        const spelling of [...spellings, "01-02-FF", "01,02,ff", "\\x01\\x02\\xff", "0x0102ff"]
      ) {
        const before = await view.evaluate(rows(/←.*01 02 ff.*3 bytes/)) as number;
        await submit(view, JSON.stringify(spelling));
        await shows(view, `${rows(/←.*01 02 ff.*3 bytes/)} === ${before + 1}`);
      }
    });

    pageTest("says what is no byte, until it is corrected", async () => {
      const view = await browseConnected();
      await view.click("#hex");
      await view.click("#message");
      await enter(view, "01 xy");
      await shows(view, includes("error", "xy"), `${rows(/→/)} === 0`);
      await shows(view, "message.ariaInvalid === 'true'", "error.getAttribute('role') === 'alert'");
      await view.press("Backspace");
      await view.press("Backspace");
      await shows(view, `${textOf("error")} === ""`, "message.ariaInvalid === 'false'");
      await enter(view, "0");
      await shows(view, includes("error", "0"), `${rows(/→/)} === 0`);
      await view.click("#hex");
      await shows(view, `${textOf("error")} === ""`);
    });

    pageTest("writes whole texts of both directions to the console", async () => {
      const view = await browseConnected();
      await view.evaluate(recordConsole);
      await submit(view, `"begin" + "-".repeat(5000) + "end"`);
      await shows(view, row(/←/), `printed.includes("begin" + "-".repeat(5000) + "end")`);
      await shows(view, `printed.includes("dne" + "-".repeat(5000) + "nigeb")`);
    });

    // ---- On the wire

    pageTest("shows the last frame of each direction as it travels", async () => {
      const view = await browseConnected();
      await enter(view, "Hello, world!");
      await shows(view, includes("sentFrame", "81 8d mm mm mm mm …"));
      await shows(view, includes("sentFrame", "The header costs 6 bytes: 19 bytes travel"));
      await shows(view, includes("receivedFrame", "81 0d 21 64 6c 72 6f 77 20 2c 6f 6c 6c 65 48"));
      await shows(view, includes("receivedFrame", "The header costs 2 bytes: 15 bytes travel"));
      await shows(
        view,
        includes("wire", "cannot know the mask key"),
        includes("wire", "fragments"),
      );
    });

    pageTest("shows how the header grows with the length of a message", async () => {
      const view = await browseConnected("?protocol=echo");
      const frames: [number, string, string, number][] = [
        [0, "81 80 mm mm mm mm", "81 00", 6],
        [125, "81 fd mm mm mm mm …", "81 7d 78", 6],
        [126, "81 fe 00 7e mm mm mm mm …", "81 7e 00 7e 78", 8],
        [65535, "81 fe ff ff mm mm mm mm …", "81 7e ff ff 78", 8],
        [65536, "81 ff 00 00 00 00 00 01 00 00 mm", "81 7f 00 00 00 00 00 01 00 00 78", 14],
      ];
      for (const [length, sent, received, header] of frames) {
        await submit(view, `"x".repeat(${length})`);
        await shows(view, includes("sentFrame", sent), includes("receivedFrame", received));
        await shows(view, includes("sentFrame", `The header costs ${header} bytes`));
      }
    });

    pageTest("shows bytes as opcode 2", async () => {
      const view = await browseConnected("?protocol=on-demand");
      await enter(view, "bytes 3");
      await shows(view, includes("receivedFrame", "82 03 00 00 00"), row(/←.*00 00 00.*3 bytes/));
    });

    pageTest("links to MDN and RFC 6455", async () => {
      const view = await browseConnected();
      for (const host of ["developer.mozilla.org", "www.rfc-editor.org"]) {
        await shows(view, `wire.querySelector('a[href*="//${host}/"][rel=noreferrer]') !== null`);
      }
    });

    // ---- Times N

    const runTimes = (view: View, text: string, number: number) =>
      view.evaluate(`times.open = true, message.value = ${JSON.stringify(text)},
        document.getElementById("number").value = ${number}, run.click()`);

    pageTest("sends a message N times and shows the round trips in one row", async () => {
      const view = await browseConnected();
      await runTimes(view, "Hello", 500);
      const figure = "[\\d.,]+ ms";
      const figures = ["total", "median", "99th percentile", "longest"].map((n) =>
        `${n} ${figure}`
      );
      await shows(view, row(new RegExp(`Times 500, 5 bytes: ${figures.join(", ")}`)));
      await shows(view, "log.querySelectorAll('svg path').length === 1", `${rows(/[→←]/)} === 0`);
      await shows(view, "log.children.length === 2", "run.textContent === 'Send N times'");
    });

    pageTest("has one message under way at a time", async () => {
      const view = await browseConnected("", { subprotocols: mute });
      await view.evaluate(`(() => {
        globalThis.sendings = 0;
        const { send } = WebSocket.prototype;
        WebSocket.prototype.send = function (data) {
          sendings++;
          return send.call(this, data);
        };
      })()`);
      await runTimes(view, "Hello", 500);
      await sleep(500);
      await shows(view, "sendings === 1");
    });

    pageTest("can be stopped, and goes on as before", async () => {
      const view = await browseConnected("?protocol=echo");
      await runTimes(view, "Hello", 100_000);
      await shows(view, "run.textContent === 'Stop'", "progress.value > 100");
      await view.click("#run");
      await shows(view, row(/Times 100,000, stopped after [\d,]+, 5 bytes: total/));
      await submit(view, `"afterwards"`);
      await shows(view, row(/←.*afterwards.* ms/), `${rows(/[→←]/)} === 2`);
    });

    pageTest("ends with its row when the connection ends", async () => {
      const server = startServer();
      const view = await browse(`http://localhost:${server.port}/`);
      await shows(view, state("connected"));
      await runTimes(view, "Hello", 100_000);
      await shows(view, "progress.value > 100");
      await server.stop();
      await shows(view, row(/stopped after/), row(/Connection lost/), "run.matches(':disabled')");
    });

    pageTest("is offered only where a reply belongs to a message", async () => {
      const view = await browseConnected();
      const address = await view.evaluate("address.value") as string;
      for (const name of [NAME, "echo", "count", "chat", "on-demand"]) {
        await use(view, "connect", { address, protocol: name });
        await shows(view, state("connected"), status(name));
        const isOffered = [NAME, "echo"].includes(name);
        await shows(view, `run.matches(":disabled") === ${!isOffered}`);
      }
    });

    // ---- Floods

    pageTest("sends 10,000 messages and is blocked for less than 2 s", async () => {
      const view = await browseConnected();
      const blocked = await view.evaluate(`(() => {
        const start = performance.now();
        for (let i = 0; i < 10_000; i++) {
          message.value = "number " + i;
          form.requestSubmit();
        }
        return performance.now() - start;
      })()`) as number;
      await shows(view, logged("9999 rebmun"), "log.children.length === 200", green);
      assert.ok(blocked < 2000, `${blocked} ms`);
    });

    pageTest("survives 50,000 pushed messages", async () => {
      const view = await browseConnected("?protocol=on-demand");
      for (let i = 0; i < 5; i++) await submit(view, `"repeat 10000 hello"`);
      await submit(view, `"delay 1 the end"`);
      await shows(view, row(/←.*the end/), "log.children.length === 200", green);
      await submit(view, `"delay 1 afterwards"`);
      await shows(view, row(/←.*afterwards/));
    });

    // ---- The document

    pageTest("keeps to its policy, with one style and one script", async () => {
      const page = readFileSync(join(import.meta.dirname!, "index.html"), "utf8");
      for (const [pattern, number] of [[/<style/g, 1], [/<script/g, 1], [/ style=| on\w+=/g, 0]]) {
        assert.equal([...page.matchAll(pattern as RegExp)].length, number, String(pattern));
      }
      const port = listen();
      const view = await browse("about:blank");
      await view.cdp("Page.addScriptToEvaluateOnNewDocument", {
        source: `globalThis.violations = [];
          addEventListener("securitypolicyviolation", (e) => violations.push(e.violatedDirective))`,
      });
      await view.navigate(`http://localhost:${port}/`);
      await shows(view, state("connected"));
      await runTimes(view, "Hello", 10);
      await shows(view, row(/Times 10/), "violations.length === 0");
    });

    pageTest("has a language, a heading and a label for each field", async () => {
      const view = await browseConnected();
      await shows(view, "document.documentElement.lang === 'en'");
      await shows(view, "document.querySelector('h1').textContent === 'WebSocket test'");
      const fields = "[...document.querySelectorAll('input, textarea')]";
      await shows(view, `${fields}.every((field) => field.labels.length === 1)`);
    });

    for (const width of [320, 390, 900, 1600]) {
      pageTest(`fits a window of ${width} pixels, its tools opened`, async () => {
        const view = await browseConnected();
        await view.resize(width, 700);
        await view.evaluate("connection.open = wire.open = times.open = true");
        await submit(view, `"x".repeat(1000)`);
        await runTimes(view, "Hello", 10);
        await shows(view, row(/Times 10/), `innerWidth === ${width}`);
        await shows(view, `document.documentElement.scrollWidth <= ${width}`);
      });
    }

    for (const scheme of ["light", "dark"]) {
      pageTest(`has a contrast of at least 4.5 in every text, ${scheme}`, async () => {
        const view = await browseConnected("?protocol=on-demand");
        const features = [{ name: "prefers-color-scheme", value: scheme }];
        await view.cdp("Emulation.setEmulatedMedia", { features });
        await shows(view, `matchMedia("(prefers-color-scheme: ${scheme})").matches`);
        await view.evaluate("connection.open = wire.open = times.open = true");
        await submit(view, `"a\\tb"`);
        await submit(view, `"close 4001 bye"`);
        await shows(view, row(/←/), row(/Connected again/));
        await view.evaluate("hex.checked = true");
        await submit(view, `"xy"`);
        assert.deepEqual(await view.evaluate(lowContrasts), []);
      });
    }
  });
}

/** The texts of the page whose contrast with what is behind them is under 4.5 (WCAG 1.4.3). */
const lowContrasts = `(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const channels = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => {
    const [r, g, b] = channels(color).map((value) => value / 255)
      .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return channels(color)[3] === 255 ? color : behind(element.parentElement);
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!hasText || element.matches("script, style, option, :disabled, :disabled *")) continue;
    const [a, b] = [getComputedStyle(element).color, behind(element)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(element.textContent.trim().slice(0, 40) + " " + ratio.toFixed(2));
  }
  return low;
})()`;

// ---- The README ---------------------------------------------------------------------------------
// Each code block of README.md is run as it stands there, in a copy of the project to which everything
// was added that the README says to add. localhost:9000 stands for a server that the test has started,
// 9001 for a free port. What a command or a program prints must be the `text` block below it.

type Block = {
  language: string;
  code: string;
  /** What the README says that it prints. */
  output?: string;
  line: number;
  heading: string;
  /** The paragraph above it. */
  introduction: string;
};

const readme = readFileSync(join(here, "README.md"), "utf8");
const readmeBlocks = parseReadme();

function parseReadme(): Block[] {
  const blocks: Block[] = [];
  for (const { 1: language, 2: code, index } of readme.matchAll(/^```(\w+)\n([^]*?)^```$/gm)) {
    const textBefore = readme.slice(0, index);
    const line = textBefore.split("\n").length;
    const heading = textBefore.match(/^#+ .*$/gm)!.at(-1)!.replace(/^#+ /, "");
    const introduction = textBefore.trimEnd().split("\n\n").at(-1)!.replaceAll("\n", " ");
    if (language !== "text") {
      blocks.push({ language, code, line, heading, introduction });
    } else {
      const block = blocks.at(-1)!;
      assert.equal(block.output, undefined, `README.md, line ${line}: the output of which block?`);
      block.output = code;
    }
  }
  return blocks;
}

/** The name of the file that a block is to be saved as. */
function fileName({ introduction }: Block): string | undefined {
  return introduction.match(/Save it as `([^`]+)`/)?.[1];
}

const isNotRun = ({ introduction }: Block) => introduction.includes("not run by the tests");
const isSubprotocol = ({ code }: Block) => /^"\w+": /.test(code);
const isShell = ({ language }: Block) => language === "sh";
const isTest = ({ introduction }: Block) => introduction.includes("end of `server_test.ts`");

/** Makes a copy of the project as it is for somebody who did all that the README says. */
function projectOfReader(port: number): string {
  const folder = temporaryFolder();
  for (const file of readdirSync(here)) {
    if (file === ".git" || file === "node_modules") continue;
    cpSync(join(here, file), join(folder, file), { recursive: true });
  }
  for (const block of readmeBlocks) {
    const name = fileName(block);
    if (name) writeFileSync(join(folder, name), block.code.replaceAll("9001", String(port)));
    if (isTest(block)) appendFileSync(join(folder, "server_test.ts"), `\n${block.code}`);
    if (isSubprotocol(block)) addToTable(folder, block.code);
  }
  return folder;
}

function addToTable(folder: string, code: string): void {
  const file = join(folder, "server.ts"), source = readFileSync(file, "utf8");
  const table = "export const subprotocols: Record<string, Subprotocol> = {\n";
  assert.ok(source.includes(table), "server.ts has a table of subprotocols");
  writeFileSync(file, source.replace(table, table + code.replace(/^(?=.)/gm, "  ")));
}

/** A command in a terminal, where Ctrl+C reaches all processes of the command. */
class Terminal {
  stdout = "";
  stderr = "";
  readonly #child: ChildProcess;
  readonly #end: Promise<number | null>;

  constructor(command: string, folder: string, port: number) {
    const path = `${process.env.PATH}:/usr/sbin`; // Debian's place for nginx
    const env = { ...process.env, PATH: path, NO_COLOR: "1", PORT: String(port) };
    this.#child = spawn("sh", ["-c", command], { cwd: folder, env, detached: true });
    this.#child.stdout!.on("data", (data) => this.stdout += data);
    this.#child.stderr!.on("data", (data) => this.stderr += data);
    this.#end = new Promise((resolve) => this.#child.on("close", resolve));
    cleanups.push(() => (this.#signal("SIGKILL"), this.#end));
  }

  #signal(name: "SIGINT" | "SIGKILL"): void {
    try {
      process.kill(-this.#child.pid!, name);
    } catch { // all its processes have ended
    }
  }

  /** Waits until it says where it listens; gives undefined if it ends instead. */
  url(): Promise<string | undefined> {
    const pattern = /\w+:\/\/localhost:\d+\/$/m;
    return until(this.#child.stdout!, () => this.stdout.match(pattern)?.[0]);
  }

  async stopWithCtrlC(): Promise<void> {
    this.#signal("SIGINT");
    await this.#end;
  }

  async endsWell(): Promise<void> {
    assert.equal(await this.#end, 0, this.stdout + this.stderr);
  }

  /** Waits until it has printed as many lines as expected, or has ended, and compares them all. */
  async prints(expected: string): Promise<void> {
    const isComplete = () => this.stdout.split("\n").length >= expected.split("\n").length;
    await until(this.#child.stdout!, () => isComplete() || undefined);
    const withoutPorts = (text: string) => text.replace(/(localhost|127\.0\.0\.1):\d+/g, "$1");
    assert.equal(withoutPorts(this.stdout), withoutPorts(expected), this.stderr);
  }
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as { port: number };
  await new Promise((resolve) => server.close(resolve));
  return port;
}

const [ownRuntime, otherRuntime] = onDeno ? ["deno", "bun"] : ["bun", "deno"];

/** The commands of a block, without those that the tests of the other runtime run. */
function ownCommands({ code }: Block): string[] {
  const commands = code.trimEnd().split("\n");
  const isFor = (runtime: string) => (command: string) => command.startsWith(`${runtime} `);
  const isForOther = commands.some(isFor(otherRuntime)) && !commands.some(isFor(ownRuntime));
  return isForOther ? [] : commands.filter((command) => !isFor(otherRuntime)(command));
}

/** Runs the commands of a block one after the other. */
async function runCommands(block: Block): Promise<void> {
  const port = await freePort();
  const folder = projectOfReader(port);
  if (block.code.includes("--cert ")) {
    const makeCertificate = readmeBlocks.find(({ code }) => code.startsWith("openssl "))!.code;
    await new Terminal(makeCertificate, folder, port).endsWell();
  }
  for (const command of ownCommands(block)) {
    const text = command.replaceAll("localhost:9000", `localhost:${listen()}`);
    const terminal = new Terminal(text, folder, port);
    const url = await terminal.url();
    if (!url) {
      await terminal.endsWell();
      if (block.output) await terminal.prints(block.output);
      if (isTestCommand(command)) assert.match(terminal.stdout + terminal.stderr, /\b1 pass/);
      continue;
    }
    assert.equal(new URL(url).port, String(port), terminal.stderr);
    if (command.includes("--reuse-port")) {
      const second = new Terminal(text, folder, port);
      assert.equal(await second.url(), url, second.stderr);
    }
    const raw = await askHello(url, folder);
    if (block.output) await terminal.prints(block.output);
    raw.socket.destroy();
    await terminal.stopWithCtrlC();
  }
}

const isTestCommand = (command: string) => command.endsWith(" server_test.ts");

/** Connects to a server that a command has started, and gets a message reversed. */
async function askHello(url: string, folder: string): Promise<Raw> {
  const port = Number(new URL(url).port);
  const ca = () => readFileSync(join(folder, "cert.pem"));
  const raw = url.startsWith("https:")
    ? new Raw(connectTls({ port, host: "127.0.0.1", servername: "localhost", ca: ca() }))
    : Raw.to(port);
  raw.socket.write(handshake());
  assert.equal((await raw.nextResponse())?.status, 101);
  assert.equal(await raw.ask("Hello, world!"), "!dlrow ,olleH");
  return raw;
}

/** Runs a program on this runtime. Clients end when their server does. */
async function runReadmeProgram({ code, output }: Block): Promise<void> {
  const server = startServer();
  const folder = projectOfReader(0);
  const text = code.replaceAll("localhost:9000", `localhost:${server.port}`);
  writeFileSync(join(folder, "program.ts"), text);
  const command = onDeno ? "deno run --allow-net program.ts" : "bun program.ts";
  const terminal = new Terminal(`${command} 2>&1`, folder, 0);
  await terminal.prints(output!);
  await server.stop();
  await terminal.endsWell();
  await terminal.prints(output!);
}

/** Adds an entry to the table and sends it "hello". */
async function trySubprotocol({ code, output }: Block): Promise<void> {
  const folder = projectOfReader(0);
  const port = await startProgram(["--port", "0"], {}, join(folder, "server.ts")).port();
  const raw = await Raw.open(port, code.match(/^"(\w+)"/)![1]);
  raw.socket.write(Buffer.concat([encodeFrame(TEXT, "hello"), closeFrame(1000)]));
  let received = "";
  for (let frame; (frame = await raw.nextFrame()) && frame.opcode === TEXT;) {
    received += `${frame.data}\n`;
  }
  assert.equal(received, output);
}

async function runPython({ code, output }: Block): Promise<void> {
  const folder = temporaryFolder();
  const text = code.replaceAll("localhost:9000", `127.0.0.1:${listen()}`);
  writeFileSync(join(folder, "program.py"), text);
  const terminal = new Terminal("/usr/bin/python3 program.py", folder, 0);
  await terminal.endsWell();
  await terminal.prints(output!);
}

/** Starts nginx with a `server` block that holds the README's, and talks through it. */
async function tryNginx({ code }: Block): Promise<void> {
  const port = await freePort();
  const folder = temporaryFolder();
  const location = code.replaceAll("127.0.0.1:9000", `127.0.0.1:${listen()}`);
  const paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
  const configuration = `
    daemon off; master_process off; pid nginx.pid; error_log stderr;
    events {}
    http {
      access_log off;
      ${paths.map((name) => `${name}_temp_path ${name};`).join(" ")}
      server { listen 127.0.0.1:${port}; ${location} }
    }`;
  writeFileSync(join(folder, "nginx.conf"), configuration);
  const nginx = new Terminal(`nginx -p ${folder} -c nginx.conf -e stderr`, folder, 0);
  const isReady = () => request(port, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
  await eventually(isReady, nginx.stderr);

  const page = await request(port, "GET /echo/ HTTP/1.1\r\nHost: localhost\r\n\r\n");
  assert.equal(page.status, 200);
  const raw = Raw.to(port);
  raw.socket.write(handshake({}, "GET /echo/ HTTP/1.1"));
  assert.equal((await raw.nextResponse())?.status, 101);
  assert.equal(await raw.ask("Hello, world!"), "!dlrow ,olleH");
  const timeout = Number(code.match(/proxy_read_timeout (\d+)s;/)?.[1]);
  assert.ok(timeout > limits.idleSeconds, "nginx waits longer than the server");
}

/** How a block is run; undefined if no test knows how. */
function runnerOf(block: Block): (() => Promise<void> | void) | undefined {
  const { language, output } = block;
  const name = isTest(block) ? "server_test.ts" : fileName(block);
  if (language === "sh") return () => runCommands(block);
  if (language === "nginx") return () => tryNginx(block);
  if (language === "python" && output) return () => runPython(block);
  if (language !== "ts" && language !== "js") return undefined;
  if (name) return () => assert.ok(hasCommandFor(name), `no command runs ${name}`);
  if (isSubprotocol(block) && output) return () => trySubprotocol(block);
  return output ? () => runReadmeProgram(block) : undefined;
}

/** Whether the README has a command that runs a file, for the runtime of these tests. */
function hasCommandFor(file: string): boolean {
  const commands = readmeBlocks.filter((block) => isShell(block) && !isNotRun(block));
  return commands.flatMap(ownCommands).some((command) => command.endsWith(` ${file}`));
}

function reasonToSkip(block: Block): string | false {
  const isInstalled = (command: string) => spawnSync("sh", ["-c", command]).status === 0;
  if (block.language === "python") {
    return without("Python's websockets", isInstalled("/usr/bin/python3 -c 'import websockets'"));
  }
  if (block.language === "nginx") {
    return without("nginx", isInstalled("PATH=$PATH:/usr/sbin; command -v nginx"));
  }
  if (!isShell(block)) return false;
  const commands = ownCommands(block);
  if (commands.length === 0) return `the tests on ${onDeno ? "Bun" : "Deno"} run it`;
  const tools = commands.flatMap((command) => command.match(/^\w+/)?.[0] ?? []);
  if (block.code.includes("--cert ")) tools.push("openssl");
  // On a computer where the runtimes are installed, npx would download them a second time.
  const isUnderNpx = process.env.npm_command === "exec";
  if (tools.includes("npx") && !isUnderNpx) return without("npx's copy of the runtimes", false);
  const missing = tools.find((tool) => !isInstalled(`command -v ${tool}`));
  return missing !== undefined && without(missing, false);
}

describe("the README", () => {
  for (const block of readmeBlocks.filter((block) => !isNotRun(block))) {
    const { heading, language, line } = block;
    const options = { timeout: 60_000, skip: reasonToSkip(block) };
    it(`"${heading}", line ${line}: the ${language} block works`, options, () => {
      return runnerOf(block)!();
    });
  }

  test("each code block is run by a test, or says that it is not", () => {
    for (const block of readmeBlocks) {
      assert.ok(isNotRun(block) || runnerOf(block), `README.md, line ${block.line}`);
    }
    const fences = readme.match(/^\s*(```|~~~)/gm)!;
    const outputs = readmeBlocks.filter(({ output }) => output !== undefined);
    assert.equal(fences.length, 2 * (readmeBlocks.length + outputs.length));
  });

  test("each command can be pasted into zsh: no comments, no unquoted patterns", () => {
    for (const { code, line } of readmeBlocks.filter(isShell)) {
      const unquoted = code.replace(/'[^']*'/g, "");
      assert.doesNotMatch(unquoted, /[#?*[\]~!^]|\s=/, `README.md, line ${line}`);
    }
  });
});

// ---- The benchmark ----------------------------------------------------------------------------
// `deno task bench` runs it; the tests do not. In each group the usual ways are told as ratios.

if (typeof Deno !== "undefined") {
  const segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });
  const kinds = {
    ASCII: "The quick brown fox jumps over the lazy dog, 0123456789. ",
    "plain scripts": "Žluťoučký kůň úpěl ďábelské ódy. Быстрая лиса 日本語のテキスト 안녕하세요 ",
    "emoji and marks": "Žluťoučký kůň 👨‍👩‍👧 e\u0301 日本語 🇨🇿 ",
  };
  for (const [kind, sample] of Object.entries(kinds)) {
    for (
      const [size, name] of [[16, "16 B"], [1024, "1 KiB"], [65536, "64 KiB"], [
        1048576,
        "1 MiB",
      ]] as const
    ) {
      const text = Buffer.from(sample.repeat(size / 16)).subarray(0, size).toString();
      const group = `${kind}, ${name}`;
      Deno.bench("reverse", { group, baseline: true }, () => void reverse(text));
      Deno.bench('[...s].reverse().join("")', { group }, () => void [...text].reverse().join(""));
      Deno.bench("Intl.Segmenter", { group }, () => {
        Array.from(segmenter.segment(text), (s) => s.segment).reverse().join("");
      });
    }
  }
}
