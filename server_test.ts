/**
 * Tests of server.ts and index.html, for `deno test -A` and `bun test` alike. Each runtime tests the
 * server as it runs there, over real sockets on free ports.
 *
 * Helpers come first: servers, then clients. The groups of tests follow, in this order:
 *
 * - "HTTP": the page, and every other request that is no handshake
 * - "the handshake": which handshakes are accepted, and how the others are refused
 * - "selecting a subprotocol", "the subprotocols" of server.ts, "writing a subprotocol"
 * - "reversing" on its own, and "messages" over a connection
 * - "the log", "the command line", "serve()" in a program of one's own, "TLS"
 * - "limits" and their ranges, "slow readers", "the number of connections"
 * - "failing subprotocols", "hostile clients"
 * - "stopping": signals, `deno task` and `stop()`
 * - "the page" in Chromium, "the README"
 *
 * Last comes the benchmark of `reverse`, for `deno task bench`.
 */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import {
  type ChildProcess,
  execFileSync,
  spawn,
  type SpawnOptions,
  spawnSync,
} from "node:child_process";
import { createHash } from "node:crypto";
import { once } from "node:events";
import {
  appendFileSync,
  cpSync,
  existsSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { connect as connectHttp2, type IncomingHttpHeaders } from "node:http2";
import { connect as connectTcp, createServer, type Socket } from "node:net";
import { networkInterfaces, tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import type { Readable } from "node:stream";
import { afterEach, describe, it } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { connect as connectTls, createServer as createTlsServer } from "node:tls";
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
const onLinux = process.platform === "linux";
const page = readFileSync(join(here, "index.html"), "utf8");

/** What a test has started is ended after it, the last one first. */
const cleanups: (() => unknown)[] = [];

afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

/** A test of at most a minute. Without a limit, Bun gives up after 5 s and Deno never. */
function test(name: string, run: () => Promise<void> | void, skip: string | false = false): void {
  it(name, { timeout: 60_000, skip }, run);
}

/**
 * Returns why the tests that need a tool are skipped, or false if the tool is there. On CI nothing
 * may be skipped for a missing tool, so there a test fails that says how to get it.
 */
function without(tool: string, isFound: boolean, howToGet = `install ${tool}`): string | false {
  if (isFound) return false;
  const reason = `${tool} is missing: ${howToGet}`;
  if (process.env.CI) it(`${tool} is installed`, () => assert.fail(reason));
  return reason;
}

// ---- Servers ------------------------------------------------------------------------------------

/** Starts a server in this process, until the end of the test, and returns its port. */
function listen(options: Options = {}): number {
  return startServer(options).port;
}

/** Starts a server in this process that the test can stop. */
function startServer(options: Options = {}): Server {
  const server = serve({ port: 0, hostname: "127.0.0.1", quiet: true, ...options });
  cleanups.push(server.stop);
  return server;
}

/** Starts a server that speaks one more subprotocol, "added". */
function listenWith(added: Subprotocol, options: Options = {}): number {
  return listen({ ...options, subprotocols: { ...subprotocols, added } });
}

/** Starts a server in a process of its own, so that it works while the client does. */
function listenSeparately(): Promise<number> {
  return startProgram(["--port", "0", "--quiet"]).port();
}

/** Accepts TCP connections and never responds. */
async function listenSilently(): Promise<number> {
  const server = createServer(() => {});
  cleanups.push(() => server.close());
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return (server.address() as { port: number }).port;
}

/** Starts a proxy that serves another port under a path, and returns its own port. */
async function listenUnderPath(path: string, port: number): Promise<number> {
  const proxy = createServer((client) => {
    const upstream = connectTcp(port, "127.0.0.1");
    const rewrite = (data: Buffer) => data.toString("latin1").replace(`GET ${path}`, "GET /");
    client.on("data", (data) => upstream.write(rewrite(data), "latin1"));
    upstream.pipe(client);
    for (const socket of [client, upstream]) {
      socket.on("error", () => {});
      cleanups.push(() => socket.destroy());
    }
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
  readonly #exitStatus: Promise<number | null>;

  constructor(
    command: string,
    args: string[],
    env: Record<string, string> = {},
    options: SpawnOptions = {},
  ) {
    this.child = spawn(command, args, {
      cwd: here,
      env: { ...process.env, NO_COLOR: "1", ...env },
      ...options,
    });
    this.child.stdout!.on("data", (data) => this.out += data);
    this.child.stderr!.on("data", (data) => this.err += data);
    this.#exitStatus = new Promise((resolve) => this.child.on("close", resolve));
    cleanups.push(() => {
      this.child.kill("SIGKILL");
      return this.#exitStatus;
    });
  }

  /** Waits for the line that says where the server listens, and returns the port. */
  async port(): Promise<number> {
    const [, port] = await this.prints(/^Listening on https?:\/\/[^/]*:(\d+)\/$/m);
    return Number(port);
  }

  /** Waits until the program has printed a match. */
  async prints(pattern: RegExp): Promise<RegExpMatchArray> {
    const match = await until(this.child.stdout!, () => this.out.match(pattern) ?? undefined);
    return match ?? assert.fail(`${pattern} not in: ${this.out}${this.err}`);
  }

  /** Waits until the program has printed a match to stderr. */
  async reports(pattern: RegExp): Promise<void> {
    await until(this.child.stderr!, () => pattern.test(this.err) || undefined);
    assert.match(this.err, pattern);
  }

  /** Sends a signal. With `child.kill`, Deno would not tell the exit status. */
  signal(name: "SIGINT" | "SIGTERM"): void {
    process.kill(this.child.pid!, name);
  }

  /** Waits for the end of the program and returns its exit status. */
  exitStatus(): Promise<number | null> {
    return this.#exitStatus;
  }
}

// With these arguments, the runtime runs a file as `deno task start` does; certificates need reading.
const denoArgs = ["run", "--no-prompt", "--allow-net", "--allow-read", "--allow-env=PORT"];
const runtimeArgs = onDeno ? denoArgs : [];

/** Starts server.ts, or another file, with arguments. */
function startProgram(
  args: string[],
  env?: Record<string, string>,
  file = join(here, "server.ts"),
): Program {
  return new Program(process.execPath, [...runtimeArgs, file, ...args], env);
}

/** Starts a copy of server.ts with lines added to it, as somebody makes it their own. */
function startExtended(addedLines: string, args: string[] = []): Program {
  const source = readFileSync(join(here, "server.ts"), "utf8");
  const folder = copyServer({ "server.ts": `${source}\n${addedLines}` });
  return startProgram(["--port", "0", ...args], {}, join(folder, "server.ts"));
}

/** Starts a program that uses server.ts. The program prints where it listens. */
function startOwnProgram(code: string): Program {
  const folder = copyServer({ "program.ts": code });
  return startProgram([], {}, join(folder, "program.ts"));
}

/** Copies the server to a new folder, with some files replaced or added, and returns the folder. */
function copyServer(files: Record<string, string> = {}): string {
  const folder = temporaryFolder();
  for (const name of ["server.ts", "index.html", "deno.json"]) {
    cpSync(join(here, name), join(folder, name));
  }
  for (const [name, content] of Object.entries(files)) writeFileSync(join(folder, name), content);
  return folder;
}

/** Makes a folder that is removed after the test. */
function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), "server-test-"));
  cleanups.push(() => rmSync(folder, { recursive: true }));
  return folder;
}

/** Makes a certificate and returns the arguments with which the server uses it. */
function certificate(): string[] {
  const folder = temporaryFolder();
  const cert = join(folder, "cert.pem");
  const key = join(folder, "key.pem");
  const options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
  const args = [...options.split(" "), "-subj", "/CN=localhost", "-keyout", key, "-out", cert];
  execFileSync("openssl", args, { stdio: "ignore" });
  return ["--cert", cert, "--key", key];
}

const withoutOpenssl = without(
  "openssl",
  spawnSync("openssl", ["version"]).status === 0,
  "apt-get install openssl",
);

// ---- Clients ------------------------------------------------------------------------------------

/** Waits until something is found, looking again at each event of a stream, or until its end. */
function until<T>(stream: Readable, find: () => T | undefined): Promise<T | undefined> {
  return new Promise((resolve) => {
    const check = () => {
      const found = find();
      if (found === undefined && !stream.destroyed) return;
      stream.off("data", check).off("close", check);
      resolve(found);
    };
    stream.on("data", check).on("close", check);
    check();
  });
}

type HttpResponse = { status: number; body: string; header(name: string): string[] };
type Frame = { fin: boolean; opcode: number; data: Buffer };

const CONTINUATION = 0;
const TEXT = 1;
const BINARY = 2;
const CLOSE = 8;
const PING = 9;
const PONG = 10;

/** A client that hides nothing: it sends and shows single HTTP messages and WebSocket frames. */
class RawClient {
  #bytes = Buffer.alloc(0); // received, but not yet taken

  constructor(readonly socket: Socket) {
    cleanups.push(() => socket.destroy());
    socket.on("data", (chunk) => this.#bytes = Buffer.concat([this.#bytes, chunk]));
    socket.on("error", () => {}); // "close" follows, which is enough
  }

  /** The IP address and port of this client, while it is connected. */
  get address(): string {
    return `127.0.0.1:${this.socket.localPort}`;
  }

  /** Connects by TCP. */
  static to(port: number): RawClient {
    return new RawClient(connectTcp(port, "127.0.0.1"));
  }

  /** Connects by WebSocket. */
  static open(port: number, subprotocol = NAME): Promise<RawClient> {
    return RawClient.openWith(port, handshake({ "Sec-WebSocket-Protocol": subprotocol }));
  }

  /** Connects by WebSocket with a handshake of one's own. */
  static async openWith(port: number, handshakeText: string): Promise<RawClient> {
    const client = RawClient.to(port);
    client.socket.write(handshakeText);
    assert.equal((await client.nextResponse())?.status, 101);
    return client;
  }

  /** Waits for the next response; undefined at the end of the connection. */
  nextResponse(method = "GET"): Promise<HttpResponse | undefined> {
    return until(this.socket, () => this.#takeResponse(method));
  }

  #takeResponse(method: string): HttpResponse | undefined {
    const blankLine = this.#bytes.indexOf("\r\n\r\n");
    if (blankLine < 0) return undefined;
    const bodyStart = blankLine + 4;
    const head = this.#bytes.toString("latin1", 0, bodyStart);
    const header = (name: string) =>
      [...head.matchAll(new RegExp(`^${name}: *(.*)\r`, "gim"))].map(([, value]) => value);
    const bodyLength = method === "HEAD" ? 0 : Number(header("content-length")[0] ?? 0);
    const bodyEnd = bodyStart + bodyLength;
    if (this.#bytes.length < bodyEnd) return undefined;
    const body = this.#bytes.toString("utf8", bodyStart, bodyEnd);
    this.#bytes = this.#bytes.subarray(bodyEnd);
    return { status: Number(head.slice(9, 12)), body, header };
  }

  /** Waits for the next frame; undefined at the end of the connection. */
  nextFrame(): Promise<Frame | undefined> {
    return until(this.socket, () => this.#takeFrame());
  }

  #takeFrame(): Frame | undefined {
    const bytes = this.#bytes;
    if (bytes.length < 2) return undefined;
    let length = bytes[1];
    let start = 2;
    if (length === 126) start = 4;
    if (length === 127) start = 10;
    if (bytes.length < start) return undefined;
    if (start === 4) length = bytes.readUInt16BE(2);
    if (start === 10) length = bytes.readUInt32BE(6);
    const end = start + length;
    if (bytes.length < end) return undefined;
    this.#bytes = bytes.subarray(end);
    return { fin: bytes[0] >= 128, opcode: bytes[0] & 15, data: bytes.subarray(start, end) };
  }

  /** Waits for the next frame and returns its data as text. */
  async nextText(): Promise<string | undefined> {
    const frame = await this.nextFrame();
    return frame?.data.toString();
  }

  /** Sends messages, in one go. */
  send(...messages: (string | Uint8Array)[]): void {
    const frames = messages.map((message) =>
      encodeFrame(typeof message === "string" ? TEXT : BINARY, message)
    );
    this.socket.write(Buffer.concat(frames));
  }

  /** Sends a message and returns the reply: a text, or the bytes in hexadecimal. */
  async ask(message: string | Uint8Array): Promise<string | undefined> {
    this.send(message);
    const reply = await this.nextFrame();
    return reply?.data.toString(reply.opcode === TEXT ? "utf8" : "hex");
  }

  /** Reads to the end; returns code and reason of the close frame, or "cut" if there is none. */
  async closeReason(): Promise<string> {
    const frame = await until(this.socket, () => this.#takeCloseFrame());
    if (!frame) return "cut";
    return `${frame.data.readUInt16BE()} ${frame.data.toString("utf8", 2)}`;
  }

  #takeCloseFrame(): Frame | undefined {
    let frame = this.#takeFrame();
    while (frame && frame.opcode !== CLOSE) frame = this.#takeFrame();
    return frame;
  }
}

/** Encodes a handshake; `[]` leaves a header out, two values send it twice. */
function handshake(
  changes: Record<string, string | string[]> = {},
  requestLine = "GET / HTTP/1.1",
): string {
  const headers: typeof changes = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Protocol": NAME,
    ...changes,
  };
  const headerLines = Object.entries(headers).flatMap(([name, values]) =>
    [values].flat().map((value) => `${name}: ${value}`)
  );
  return [requestLine, ...headerLines, "", ""].join("\r\n");
}

/** Encodes a frame as clients do, with a mask. */
function encodeFrame(opcode: number, payload: string | Uint8Array = "", fin = true): Buffer {
  const data = Buffer.from(payload as string);
  const mask = Buffer.from([1, 2, 3, 4]);
  const head = encodeFrameHead(data.length);
  head[0] = opcode | (fin ? 128 : 0);
  return Buffer.concat([head, mask, data.map((byte, i) => byte ^ mask[i & 3])]);
}

/** Encodes the length of a masked frame, in the shortest form. */
function encodeFrameHead(length: number): Buffer {
  if (length < 126) return Buffer.from([0, 128 | length]);
  if (length < 65536) return Buffer.from([0, 128 | 126, length >> 8, length & 255]);
  const head = Buffer.alloc(10);
  head[1] = 128 | 127;
  head.writeUInt32BE(length, 6);
  return head;
}

/** Encodes a close frame without a reason. */
function closeFrame(code: number, reason = ""): Buffer {
  return encodeFrame(CLOSE, Buffer.from([code >> 8, code & 255, ...Buffer.from(reason)]));
}

/** Sends an HTTP request on a connection of its own and returns the response. */
async function request(port: number, text: string): Promise<HttpResponse> {
  const client = RawClient.to(port);
  client.socket.write(text, "latin1");
  const [method] = text.split(" ");
  const response = await client.nextResponse(method);
  client.socket.destroy();
  return response ?? assert.fail("no response");
}

/** Connects by WebSocket as applications do. */
async function connect(port: number, subprotocol = NAME): Promise<WebSocket> {
  const socket = new WebSocket(`ws://127.0.0.1:${port}/`, subprotocol);
  cleanups.push(() => socket.close());
  socket.binaryType = "arraybuffer";
  await once(socket, "open");
  return socket;
}

/** Sends messages all at once and returns as many replies. */
function replies(socket: WebSocket, messages: Message[]): Promise<(string | ArrayBuffer)[]> {
  const collected = collect(socket, messages.length);
  for (const message of messages) socket.send(message);
  return collected;
}

/** Waits for a number of messages. Fails if the connection is closed before. */
function collect(socket: WebSocket, count: number): Promise<(string | ArrayBuffer)[]> {
  return new Promise((resolve, reject) => {
    const received: (string | ArrayBuffer)[] = [];
    socket.onmessage = ({ data }) => {
      received.push(data);
      if (received.length === count) resolve(received);
    };
    socket.onclose = ({ code }) => {
      reject(new Error(`closed with ${code} after ${received.length} messages`));
    };
  });
}

/** Fails unless a new client gets its reply. */
async function assertServes(port: number): Promise<void> {
  const client = await RawClient.open(port);
  await assertReplies(client);
  client.socket.destroy();
}

/** Fails unless an open connection, of the subprotocol that reverses, gets its reply. */
async function assertReplies(client: RawClient): Promise<void> {
  assert.equal(await client.ask("serving"), "gnivres");
}

/** Tries until something works, at most for 15 s. */
async function eventually<T>(attempt: () => T | Promise<T>, what: string): Promise<T> {
  for (let tries = 0;; tries++) {
    try {
      return await attempt();
    } catch (error) {
      if (tries === 150) throw new Error(`this never came true: ${what}`, { cause: error });
      await sleep(100);
    }
  }
}

/** Makes a function that returns random whole numbers below n, the same in each run. */
function randomNumbers(seed: number): (n: number) => number {
  return (n) => {
    seed = Math.imul(seed ^ seed >>> 15, 0x2c1b3c6d) + 0x9e3779b9 | 0;
    return ((seed ^ seed >>> 13) >>> 0) % n;
  };
}

// ---- HTTP ---------------------------------------------------------------------------------------

describe("HTTP", () => {
  /** Sends a request without a body. */
  const get = (port: number, method: string, target: string, host = "localhost") =>
    request(port, `${method} ${target} HTTP/1.1\r\nHost: ${host}\r\n\r\n`);

  /** Returns the hash of the page's style or script, as a policy has it. */
  const contentHash = (element: string) => {
    const [, content] = page.match(`<${element}[^>]*>([^]*?)</${element}>`)!;
    return createHash("sha256").update(content).digest("base64");
  };

  test("GET / returns the page", async () => {
    const { status, header, body } = await get(listen(), "GET", "/");
    assert.equal(status, 200);
    assert.equal(body, page);
    assert.deepEqual(header("content-type"), ["text/html; charset=utf-8"]);
    assert.deepEqual(header("x-content-type-options"), ["nosniff"]);
  });

  test("GET / returns the page whatever the query is", async () => {
    const { body } = await get(listen(), "GET", "/?server=wss://example.org/");
    assert.equal(body, page);
  });

  test("HEAD / returns the headers of the page without a body", async () => {
    const client = RawClient.to(listen());
    client.socket.write("HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    const response = await client.nextResponse("HEAD");
    assert.equal(response?.status, 200);
    assert.deepEqual(response.header("content-type"), ["text/html; charset=utf-8"]);
    assert.equal(response.header("content-security-policy").length, 1);
    assert.equal(await client.nextFrame(), undefined, "something follows the headers");
  });

  test("the page may use its own style and script, open WebSockets, and nothing else", async () => {
    const { header } = await get(listen(), "GET", "/");
    const [policy] = header("content-security-policy");
    assert.match(policy, /default-src 'none'/);
    assert.match(policy, /connect-src ws: wss:/);
    assert.doesNotMatch(policy, /unsafe|\*/);
    for (const element of ["style", "script"]) {
      const [, sources] = policy.match(`${element}-src ([^;]*)`)!;
      assert.equal(sources, `'sha256-${contentHash(element)}'`);
    }
  });

  test("the page works if index.html has CR LF line ends", async () => {
    const folder = copyServer({ "index.html": page.replaceAll("\n", "\r\n") });
    const program = startProgram(["--port", "0"], {}, join(folder, "server.ts"));
    const { body, header } = await get(await program.port(), "GET", "/");
    assert.equal(body, page);
    assert.ok(header("content-security-policy")[0].includes(contentHash("script")));
  });

  test("the page suggests only subprotocols that the server speaks", () => {
    const suggestions = page.matchAll(/<option[^>]*value="([^"]+)"/g);
    const names = [...suggestions].map(([, name]) => name);
    const unknownNames = names.filter((name) => !Object.hasOwn(subprotocols, name));
    assert.deepEqual(unknownNames, []);
    assert.ok(names.includes(NAME));
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
    test(`${method} / is answered with 405, which names the allowed methods`, async () => {
      const { status, header } = await get(listen(), method, "/");
      assert.equal(status, 405);
      assert.deepEqual(header("allow"), ["GET, HEAD"]);
    });
  }

  for (const host of ["a b", "localhost:99999", "[bad", "^", "a/b", "a@b", "a?b", "a#b", "a\\b"]) {
    test(`the Host header "${host}" is refused with 400`, async () => {
      const { status } = await get(listen(), "GET", "/", host);
      assert.equal(status, 400);
    });
  }
});

// ---- The handshake ------------------------------------------------------------------------------

describe("the handshake", () => {
  test("a valid handshake is answered with 101 and the hash of its key", async () => {
    const { status, header } = await request(listen(), handshake());
    assert.equal(status, 101);
    assert.deepEqual(header("sec-websocket-accept"), ["s3pPLMBiTxaQ9kYGzzhZRbK+xOo="]);
    assert.match(header("upgrade")[0], /^websocket$/i);
    assert.match(header("connection")[0], /^upgrade$/i);
  });

  test("no extension is negotiated, not even compression", async () => {
    const offer = { "Sec-WebSocket-Extensions": "permessage-deflate" };
    const { status, header } = await request(listen(), handshake(offer));
    assert.equal(status, 101);
    assert.deepEqual(header("sec-websocket-extensions"), []);
  });

  const accepted: Record<string, [string, string | string[]]> = {
    "an Upgrade header in another case": ["Upgrade", "WebSocket"],
    "an Upgrade header with other protocols": ["Upgrade", "h2c, websocket"],
    "a Connection header in another case": ["Connection", "upgrade"],
    "a Connection header with other tokens": ["Connection", "keep-alive, Upgrade"],
    "a Connection header in two lines": ["Connection", ["keep-alive", "Upgrade"]],
    "an unknown extension": ["Sec-WebSocket-Extensions", "x-unknown"],
    "any Origin header, without --origin,": ["Origin", "https://example.org"],
  };
  for (const [what, [name, value]] of Object.entries(accepted)) {
    test(`a handshake with ${what} is accepted`, async () => {
      const { status } = await request(listen(), handshake({ [name]: value }));
      assert.equal(status, 101);
    });
  }

  for (const path of ["/a/path/of/a/proxy", "/?query", "//", "/absent"]) {
    test(`a handshake for the path ${path} is accepted`, async () => {
      const { status } = await request(listen(), handshake({}, `GET ${path} HTTP/1.1`));
      assert.equal(status, 101);
    });
  }

  for (const version of [[], "8", "14", "013", "x"]) {
    const what = version.length === 0 ? "no version" : `version ${version}`;
    test(`a handshake with ${what} is refused with 426, which names version 13`, async () => {
      const text = handshake({ "Sec-WebSocket-Version": version });
      const { status, header } = await request(listen(), text);
      assert.equal(status, 426);
      assert.deepEqual(header("sec-websocket-version"), ["13"]);
      assert.deepEqual(header("upgrade"), ["websocket"]);
    });
  }

  const key = "dGhlIHNhbXBsZSBub25jZQ==";
  const refused: [string, string, string | string[], RegExp][] = [
    ["no key", "Sec-WebSocket-Key", [], /Sec-WebSocket-Key/],
    ["an empty key", "Sec-WebSocket-Key", "", /Sec-WebSocket-Key/],
    ["a short key", "Sec-WebSocket-Key", "c2hvcnQ=", /Sec-WebSocket-Key/],
    ["a key of 32 bytes", "Sec-WebSocket-Key", `${"A".repeat(43)}=`, /Sec-WebSocket-Key/],
    ["a key not in base64", "Sec-WebSocket-Key", `${"!".repeat(22)}==`, /Sec-WebSocket-Key/],
    ["two keys", "Sec-WebSocket-Key", [key, key], /Sec-WebSocket-Key/],
    ["no Upgrade header", "Upgrade", [], /Upgrade: websocket/],
    ["another Upgrade header", "Upgrade", "websockets", /Upgrade: websocket/],
    ["no Connection header", "Connection", [], /Connection: Upgrade/],
    ["another Connection header", "Connection", "keep-alive, upgraded", /Connection: Upgrade/],
  ];
  for (const [what, name, value, words] of refused) {
    test(`a handshake with ${what} is refused with 400, which names the header`, async () => {
      const { status, header, body } = await request(listen(), handshake({ [name]: value }));
      assert.equal(status, 400);
      assert.deepEqual(header("content-type"), ["text/plain; charset=utf-8"]);
      assert.match(body, words);
      assert.ok(body.length < 200, body);
    });
  }

  for (const name of ["Upgrade", "Connection"]) {
    test(`a handshake with a no-break space in ${name} is refused without an error`, async () => {
      const program = startProgram(["--port", "0", "--quiet"]);
      const text = handshake({ [name]: "\xa0Upgrade, \xa0websocket" });
      const { status } = await request(await program.port(), text);
      assert.equal(status, 400);
      assert.equal(program.err, "");
    });
  }

  const bodies = { "Content-Length": "3", "Transfer-Encoding": "chunked" };
  for (const [name, value] of Object.entries(bodies)) {
    test(`a handshake with a body (${name}) is refused with 400`, async () => {
      const { status } = await request(listen(), handshake({ [name]: value }));
      assert.equal(status, 400);
    });
  }

  test("a handshake with several faults is told about the subprotocol first", async () => {
    const changes = { "Sec-WebSocket-Protocol": [], "Sec-WebSocket-Version": "8" };
    const { status, body } = await request(listen(), handshake(changes));
    assert.equal(status, 400);
    assert.match(body, /^Sec-WebSocket-Protocol must offer one of/);
  });

  for (const method of ["POST", "PUT", "HEAD"]) {
    test(`a handshake by ${method} is refused with 405, which allows GET`, async () => {
      const { status, header } = await request(listen(), handshake({}, `${method} / HTTP/1.1`));
      assert.equal(status, 405);
      assert.match(header("allow")[0], /^GET/);
    });
  }

  for (const version of ["HTTP/1.1", "HTTP/1.0"]) {
    test(`a handshake by ${version} without a Host header is refused with 400`, async () => {
      const { status } = await request(listen(), handshake({ Host: [] }, `GET / ${version}`));
      assert.equal(status, 400);
    });
  }

  for (const [method, status] of [["GET", 200], ["POST", 405]] as const) {
    test(`${method} / works on the TCP connection of a refused handshake`, async () => {
      const client = RawClient.to(listen());
      client.socket.write(handshake({ "Sec-WebSocket-Version": "8" }));
      assert.equal((await client.nextResponse())?.status, 426);
      client.socket.write(`${method} / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n`);
      assert.equal((await client.nextResponse())?.status, status);
    });
  }

  test("a handshake that Bun refuses by itself is answered with 400, not left open", async () => {
    const { Bun } = globalThis as unknown as { Bun: { serve(options: FetchOptions): unknown } };
    type Upgrader = { upgrade(): boolean; requestIP(request: Request): unknown };
    type FetchOptions = { fetch(request: Request, server: Upgrader): unknown };
    const { serve } = Bun;
    cleanups.push(() => Bun.serve = serve);
    Bun.serve = (options) =>
      serve({
        ...options,
        fetch: (request, server) =>
          options.fetch(request, {
            upgrade: () => false,
            requestIP: (request) => server.requestIP(request),
          }),
      });
    const { status, body } = await request(listen(), handshake());
    assert.equal(status, 400);
    assert.match(body, /^Bun has refused the handshake\./);
  }, onDeno && "Deno.upgradeWebSocket refuses nothing that the server has accepted");
});

// ---- Subprotocols -------------------------------------------------------------------------------

describe("selecting a subprotocol", () => {
  const shout: Subprotocol = () => (message) => String(message).toUpperCase();
  const selected: Record<string, [string | string[], string]> = {
    "the only offer": [NAME, NAME],
    "the second offer, if the first is unknown,": [`other, ${NAME}`, NAME],
    "an offer in a list without blanks": [`a,${NAME},b`, NAME],
    "an offer between blanks and tabs": [`a ,\t ${NAME} \t, b`, NAME],
    "an offer between empty ones": [`,, ${NAME},`, NAME],
    "an offer in the second of two headers": [["a, b", `c, ${NAME}`], NAME],
    "the first of two known offers": [`a, added, ${NAME}`, "added"],
    "the first of two known offers in two headers": [[NAME, "added"], NAME],
  };
  for (const [what, [offer, name]] of Object.entries(selected)) {
    test(`${what} is selected, and the response names it once`, async () => {
      const text = handshake({ "Sec-WebSocket-Protocol": offer });
      const { status, header } = await request(listenWith(shout), text);
      assert.equal(status, 101);
      assert.deepEqual(header("sec-websocket-protocol"), [name]);
    });
  }

  const inherited = ["__proto__", "constructor", "toString", "hasOwnProperty"];
  const similar = [NAME.toUpperCase(), `${NAME}s`, `"${NAME}"`, `${NAME}\xa0`, `x,\xa0${NAME}`];
  for (const offer of [[], "", ",", "other", ...similar, ...inherited]) {
    const shown = JSON.stringify(offer).replaceAll("\xa0", "\\u00a0");
    const what = Array.isArray(offer) ? "no offer" : `the offer ${shown}`;
    test(`${what} is refused with 400, which lists the subprotocols`, async () => {
      const text = handshake({ "Sec-WebSocket-Protocol": offer });
      const { status, header, body } = await request(listenWith(shout), text);
      assert.equal(status, 400);
      const names = [...Object.keys(subprotocols), "added"].join(", ");
      assert.ok(body.includes(names), body);
      assert.deepEqual(header("content-type"), ["text/plain; charset=utf-8"]);
    });
  }

  test("a client without an offer gets the default subprotocol, unnamed", async () => {
    const client = RawClient.to(listen({ defaultSubprotocol: "echo" }));
    client.socket.write(handshake({ "Sec-WebSocket-Protocol": [] }));
    const response = await client.nextResponse();
    assert.equal(response?.status, 101);
    assert.deepEqual(response.header("sec-websocket-protocol"), []);
    assert.equal(await client.ask("same"), "same");
  });

  test("a client with unknown offers does not get the default subprotocol", async () => {
    const port = listen({ defaultSubprotocol: "echo" });
    const { status } = await request(port, handshake({ "Sec-WebSocket-Protocol": "unknown" }));
    assert.equal(status, 400);
  });
});

describe("the subprotocols", () => {
  test("echo replies with the same text or bytes", async () => {
    const client = await RawClient.open(listen(), "echo");
    assert.equal(await client.ask("noe\u0308l"), "noe\u0308l");
    assert.equal(await client.ask(Uint8Array.of(1, 2, 255)), "0102ff");
    assert.equal(await client.ask(""), "");
  });

  test("count counts for each connection on its own", async () => {
    const port = listen();
    const first = await RawClient.open(port, "count");
    assert.equal(await first.nextText(), "1");
    const second = await RawClient.open(port, "count");
    assert.equal(await first.nextText(), "2");
    assert.equal(await second.nextText(), "1");
  });

  test("count starts again at 1 after the message reset", async () => {
    const client = await RawClient.open(listen(), "count");
    assert.equal(await client.nextText(), "1");
    client.send("reset");
    const numbers = [await client.nextText(), await client.nextText(), await client.nextText()];
    assert.ok(numbers.includes("1"), `${numbers}`);
  });

  /** Counts the running intervals, and the timeouts of a minute; "timers" tells their number. */
  const timerCounter = `
    const timers = new Set<unknown>();
    const native = { setInterval, clearInterval, setTimeout, clearTimeout };
    Object.assign(globalThis, {
      setInterval: (callback: () => void, delay: number) => {
        const timer = native.setInterval(callback, delay);
        timers.add(timer);
        return timer;
      },
      setTimeout: (callback: () => void, delay: number) => {
        const timer = native.setTimeout(callback, delay);
        if (delay === 60_000) timers.add(timer);
        return timer;
      },
      clearInterval: (timer: number) => {
        timers.delete(timer);
        native.clearInterval(timer);
      },
      clearTimeout: (timer: number) => {
        timers.delete(timer);
        native.clearTimeout(timer);
      },
    });
    subprotocols["timers"] = () => () => String(timers.size);`;

  const timerUses = { "count": "", "on-demand": "delay 60000 x" };
  for (const [name, message] of Object.entries(timerUses)) {
    test(`1,000 connections of ${name} leave no timer behind`, async () => {
      const program = startExtended(timerCounter, ["--quiet"]);
      const port = await program.port();
      const counter = await RawClient.open(port, "timers");
      const countTimers = async () => Number(await counter.ask(""));
      for (let round = 0; round < 10; round++) {
        const opening = Array.from({ length: 100 }, () => RawClient.open(port, name));
        const clients = await Promise.all(opening);
        for (const client of clients) client.send(message);
        if (round === 0) {
          await eventually(async () => assert.equal(await countTimers(), 100), "100 timers");
        }
        for (const { socket } of clients) socket.resetAndDestroy();
      }
      await eventually(async () => assert.equal(await countTimers(), 0), "no timers");
    });
  }

  test("chat sends each message to all members, its sender included", async () => {
    const port = listen();
    const members = await Promise.all([1, 2, 3].map(() => RawClient.open(port, "chat")));
    members[1].send("hello all");
    for (const member of members) assert.equal(await member.nextText(), "hello all");
  });

  test("on-demand delays at most 10,000 messages in all, until their clients leave", async () => {
    const port = listen();
    const opening = Array.from({ length: 160 }, () => RawClient.open(port, "on-demand"));
    const clients = await Promise.all(opening);
    const delays = Buffer.concat(Array(64).fill(encodeFrame(TEXT, "delay 60000 x")));
    for (const client of clients) {
      client.socket.write(delays);
      client.socket.write(encodeFrame(TEXT, "help")); // its answer shows that all have arrived
    }
    await Promise.all(clients.map((client) => client.nextFrame()));
    const other = await RawClient.open(port, "on-demand");
    assert.match((await other.ask("delay 1 x"))!, /other clients delay too many/);
    for (const { socket } of clients) socket.resetAndDestroy();
    await eventually(async () => assert.equal(await other.ask("delay 1 x"), "x"), "room again");
  });

  test("chat goes on when a member is cut off", async () => {
    const port = listen();
    const members = await Promise.all([1, 2, 3].map(() => RawClient.open(port, "chat")));
    members[0].socket.resetAndDestroy();
    members[1].send(Uint8Array.of(7));
    const frame = await members[2].nextFrame();
    assert.deepEqual([...frame!.data], [7]);
  });

  test("a chat member that does not read is closed with 1008; the others miss nothing", async () => {
    const port = listen({ limits: { unreadBytes: 1024 * 1024 } });
    const reading = await RawClient.open(port, "chat");
    const silent = await RawClient.open(port, "chat");
    silent.socket.pause();
    const text = "x".repeat(100_000);
    for (let i = 0; i < 300; i++) {
      const copy = await reading.ask(text);
      assert.equal(copy?.length, text.length);
    }
    silent.socket.resume();
    assert.match(await silent.closeReason(), /^1008 too many unread/);
  });

  const commandReplies = {
    "delay 10 hello  you": "hello  you",
    "repeat 1 hello": "hello",
    "bytes 3": "000000",
    "bytes 0": "",
  };
  for (const [command, expected] of Object.entries(commandReplies)) {
    test(`on-demand replies to "${command}" with "${expected}"`, async () => {
      const client = await RawClient.open(listen(), "on-demand");
      assert.equal(await client.ask(command), expected);
    });
  }

  const commandHints: Record<string, RegExp> = {
    "help": /close CODE REASON.*headers, help$/,
    "what?": /close CODE REASON.*headers, help$/,
    "delay 60001 x": /at most 60000/,
    "delay x y": /at most 60000/,
    "delay 0000000000000000005 x": /at most 60000/,
    [`delay 1 ${"x".repeat(1001)}`]: /at most 1000 characters/,
    "repeat 99999999 x": /at most \d+ times/,
    "repeat 1.5 x": /at most \d+ times/,
    "bytes 1048577": /at most 1048576/,
    "bytes -1": /at most 1048576/,
    "bytes 99999999999999999999": /at most 1048576/,
    "close 1005 x": /1000 to 1003, 1007 to 1014 or 3000 to 4999/,
    "close 2999": /1000 to 1003, 1007 to 1014 or 3000 to 4999/,
    "close now": /1000 to 1003, 1007 to 1014 or 3000 to 4999/,
    [`close 4000 ${"é".repeat(62)}`]: /at most 123 bytes/,
  };
  for (const [command, hint] of Object.entries(commandHints)) {
    test(`on-demand explains what it cannot do: "${command.slice(0, 30)}"`, async () => {
      const client = await RawClient.open(listen(), "on-demand");
      const reply = await client.ask(command);
      assert.match(reply!, hint);
      assert.doesNotMatch(reply!, /\n/);
    });
  }

  for (const code of [1000, 1003, 1007, 1014, 3000, 4999]) {
    test(`on-demand closes the connection with ${code} and the reason asked for`, async () => {
      const client = await RawClient.open(listen(), "on-demand");
      client.send(`close ${code} bye bye`);
      assert.equal(await client.closeReason(), `${code} bye bye`);
    });
  }

  test("on-demand repeats a text as often as it is asked to", async () => {
    const socket = await connect(listen(), "on-demand");
    const received = collect(socket, 1000);
    socket.send("repeat 1000 hello");
    assert.deepEqual(new Set(await received), new Set(["hello"]));
  });

  test("on-demand limits how much text a client can delay at a time", async () => {
    const client = await RawClient.open(listen(), "on-demand");
    client.send(...Array(100).fill("delay 60000 x"));
    assert.match((await client.nextText())!, /^delay .*already$/);
  });

  test("on-demand shows the handshake as it arrived", async () => {
    const headers = { "Sec-WebSocket-Protocol": "on-demand", "X-Forwarded-For": "192.0.2.1" };
    const text = handshake(headers, "GET /a/path?query HTTP/1.1");
    const client = await RawClient.openWith(listen(), text);
    const shown = JSON.parse((await client.ask("headers"))!);
    assert.equal(shown.request, "GET /a/path?query HTTP/1.1");
    assert.equal(shown.headers["x-forwarded-for"], "192.0.2.1");
    assert.equal(shown.address, client.address);
  });

  test("on-demand does not show a page the cookies that its scripts may not read", async () => {
    const headers = {
      "Sec-WebSocket-Protocol": "on-demand",
      "Cookie": "session=secret",
      "Authorization": "Basic secret",
    };
    const client = await RawClient.openWith(listen(), handshake(headers));
    const shown = (await client.ask("headers"))!;
    assert.doesNotMatch(shown, /secret/);
    assert.equal(JSON.parse(shown).headers.cookie, "(hidden)");
    assert.equal(JSON.parse(shown).headers.authorization, "(hidden)");
  });

  test("all subprotocols work side by side on one port", async () => {
    const port = listen();
    const reversing = await RawClient.open(port);
    const echoing = await RawClient.open(port, "echo");
    const counting = await RawClient.open(port, "count");
    assert.equal(await echoing.ask("hello"), "hello");
    assert.equal(await reversing.ask("hello"), "olleh");
    assert.equal(await counting.nextText(), "1");
  });
});

describe("writing a subprotocol", () => {
  test("a subprotocol without a handler sends no replies, and pings still get a pong", async () => {
    const client = await RawClient.open(listenWith(() => {}), "added");
    client.send("x");
    client.socket.write(encodeFrame(PING, "alive"));
    assert.equal((await client.nextFrame())?.opcode, PONG);
  });

  test("a subprotocol knows its name, the client's address and the limits", async () => {
    const port = listenWith(({ subprotocolName, address, limits }) => () =>
      `${subprotocolName} ${address} ${limits.messageBytes}`
    );
    const client = await RawClient.open(port, "added");
    assert.equal(await client.ask("?"), `added ${client.address} ${limits.messageBytes}`);
  });

  test("connection.send of something else than text or bytes throws a TypeError", async () => {
    const { promise, resolve } = Promise.withResolvers<unknown>();
    const port = listenWith((connection) => {
      try {
        connection.send(5 as unknown as string);
        resolve("nothing was thrown");
      } catch (error) {
        resolve(error);
      }
    });
    await RawClient.open(port, "added");
    assert.ok(await promise instanceof TypeError);
  });

  test("a subprotocol can send text and bytes before the client sends anything", async () => {
    const port = listenWith((connection) => {
      connection.send("hello");
      connection.send(Uint8Array.of(1, 2));
    });
    const client = await RawClient.open(port, "added");
    assert.equal(await client.nextText(), "hello");
    assert.deepEqual([...(await client.nextFrame())!.data], [1, 2]);
  });

  test("what a subprotocol sends after close() does not arrive", async () => {
    const port = listenWith((connection) => {
      connection.close(4000, "that is all");
      connection.send("too late");
    });
    const client = await RawClient.open(port, "added");
    const frame = await client.nextFrame();
    assert.equal(frame?.opcode, CLOSE);
    assert.equal(frame.data.toString("utf8", 2), "that is all");
  });

  test("onclose is called once, though the server closes and the client answers", async () => {
    let calls = 0;
    const port = listenWith((connection) => {
      connection.onclose = () => void calls++;
      return () => connection.close(4000, "that is all");
    });
    const client = await RawClient.open(port, "added");
    client.send("bye");
    assert.equal(await client.closeReason(), "4000 that is all");
    client.socket.write(closeFrame(4000));
    await once(client.socket, "close");
    assert.equal(calls, 1);
  });

  test("onclose is called even if it is set after close()", async () => {
    let calls = 0;
    const port = listenWith((connection) => {
      connection.close(4001, "not today");
      connection.onclose = () => void calls++;
    });
    const client = await RawClient.open(port, "added");
    assert.equal(await client.closeReason(), "4001 not today");
    assert.equal(calls, 1);
  });

  test("a subprotocol gets no message after it has closed the connection", async () => {
    let calls = 0;
    const port = listenWith((connection) => () => {
      calls++;
      connection.close();
    });
    const client = await RawClient.open(port, "added");
    client.send(...Array(100).fill("x"));
    await client.closeReason();
    assert.equal(calls, 1);
  });

  const illegalCloseCodes = [999, 1004, 1005, 1006, 1015, 2000, 5000, 1000.5];
  const illegalCloses: [string, number, string][] = [
    ...illegalCloseCodes.map((code): [string, number, string] => [`code ${code}`, code, ""]),
    ["a reason of 124 bytes", 1000, "é".repeat(62)],
  ];
  for (const [what, code, reason] of illegalCloses) {
    test(`connection.close with ${what} throws a RangeError`, async () => {
      const { promise, resolve } = Promise.withResolvers<unknown>();
      const port = listenWith((connection) => {
        try {
          connection.close(code, reason);
          resolve("nothing was thrown");
        } catch (error) {
          resolve(error);
        }
      });
      await RawClient.open(port, "added");
      assert.ok(await promise instanceof RangeError);
    });
  }
});

// ---- Messages -----------------------------------------------------------------------------------

describe("reversing", () => {
  const segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });

  /** What `reverse` is meant to give. */
  const reverseSegments = (text: string) =>
    Array.from(segmenter.segment(text), ({ segment }) => segment).reverse().join("");

  const assertReversed = (text: string) =>
    assert.equal(reverse(text), reverseSegments(text), JSON.stringify(text));

  // The first eight are plain; the others form clusters, or halves of them.
  const pieces = [
    ..."aZ 0.\n\r\tßéж中あ한",
    "\r\n",
    ..."\u0301\u200d\ufe0f\u20e3\ufeff\u1112\u1161\u11ab\u0915\u094d\u0600\u0e33\u2028",
    ...["🇩", "🇪", "👩", "🏽", "👨‍👩‍👧", "1️⃣", "𝒳", "क्षि", "\ud800", "\udc00"],
  ];
  const random = randomNumbers(7);
  const randomPiece = () => pieces[random(random(3) ? pieces.length : 8)];
  const randomText = (length: number) => Array.from({ length }, randomPiece).join("");
  const randomAscii = (length: number) =>
    String.fromCharCode(...Array.from({ length }, () => random(128)));

  test("random texts come out as Intl.Segmenter's clusters in reverse order", () => {
    for (let i = 0; i < 3000; i++) assertReversed(randomText(random(40)));
  });

  test("texts of every length from 0 to 200 are reversed by clusters", () => {
    for (let length = 0; length <= 200; length++) {
      assertReversed("\uffff".repeat(length + 8)); // leaves bytes that must not be seen again
      assertReversed(randomAscii(length));
      assertReversed(randomText(length));
      assertReversed(`${"x".repeat(length)}é\u0301`);
    }
  });

  test("large texts are reversed by clusters, even larger ones than a message may be", () => {
    const texts = [
      "ab".repeat(limits.messageBytes / 2 + 5),
      "aé".repeat(limits.messageBytes / 2 + 5),
      "ab\r\ncdefg".repeat(9_000),
      randomText(40_000),
      randomAscii(30_000),
      randomText(3),
    ];
    for (const text of texts) {
      const isEqual = reverse(text) === reverseSegments(text); // a diff of them would take minutes
      assert.ok(
        isEqual,
        `${text.length} units that begin with ${JSON.stringify(text.slice(0, 20))}`,
      );
    }
  });

  const breakTest = "/usr/share/unicode/auxiliary/GraphemeBreakTest.txt";
  test("each line of Unicode's GraphemeBreakTest is reversed by clusters", () => {
    const lines = readFileSync(breakTest, "utf8").matchAll(/^(÷[^#\n]*)/gm);
    const texts = Array.from(lines, ([line]) => {
      const codes = Array.from(line.matchAll(/[0-9A-F]+/g), ([code]) => parseInt(code, 16));
      return String.fromCodePoint(...codes);
    });
    assert.ok(texts.length > 500);
    for (const [i, text] of texts.entries()) {
      assertReversed(text);
      assertReversed(`é${text}ж`);
      assertReversed(text + texts[random(i + 1)]);
    }
  }, without(breakTest, existsSync(breakTest), "apt-get install unicode-data"));

  test("reversing bytes leaves the given bytes unchanged", () => {
    const bytes = Uint8Array.of(1, 2, 3);
    assert.deepEqual([...reverse(bytes) as Uint8Array], [3, 2, 1]);
    assert.deepEqual([...bytes], [1, 2, 3]);
  });
});

describe("messages", () => {
  const reversedTexts: Record<string, [string, string]> = {
    "ASCII": ["Hello, world!", "!dlrow ,olleH"],
    "a combining tilde": ["man\u0303ana", "anan\u0303am"],
    "flags": ["🇩🇪🇫🇷", "🇫🇷🇩🇪"],
    "a family": ["a👨‍👩‍👧‍👦b", "b👨‍👩‍👧‍👦a"],
    "keycaps": ["1️⃣2️⃣", "2️⃣1️⃣"],
    "skin tones": ["👋🏽👍🏿", "👍🏿👋🏽"],
    "Hangul jamo": ["\u1112\u1161\u11ab\u1100\u1173\u11af", "\u1100\u1173\u11af\u1112\u1161\u11ab"],
    "a Devanagari conjunct": ["क्षि!", "!क्षि"],
    "CR LF": ["a\r\nb", "b\r\na"],
    "CR LF behind 50 letters": [`${"x".repeat(50)}\r\ny`, `y\r\n${"x".repeat(50)}`],
    "LF CR": ["a\n\rb", "b\r\na"],
    "U+FEFF at the beginning": ["\ufeffab", "ba\ufeff"],
    "U+FEFF at the end": ["ab\ufeff", "\ufeffba"],
    "control characters": ["\0a\x1b\x7f", "\x7f\x1ba\0"],
    "no characters": ["", ""],
  };
  for (const [what, [text, reversed]] of Object.entries(reversedTexts)) {
    test(`a text with ${what} comes back reversed, as text`, async () => {
      const socket = await connect(listen());
      assert.deepEqual(await replies(socket, [text]), [reversed]);
    });
  }

  for (const bytes of [[], [0], [1, 2, 255], Array.from({ length: 70_000 }, (_, i) => i & 255)]) {
    test(`a binary message of length ${bytes.length} comes back reversed, as bytes`, async () => {
      const socket = await connect(listen());
      const [reply] = await replies(socket, [Uint8Array.from(bytes)]);
      assert.ok(reply instanceof ArrayBuffer);
      assert.deepEqual([...new Uint8Array(reply)], bytes.toReversed());
    });
  }

  for (const [kind, opcode] of [["text", TEXT], ["binary", BINARY]] as const) {
    test(`an empty ${kind} message gets an empty ${kind} reply in one frame`, async () => {
      const client = await RawClient.open(listen());
      client.socket.write(encodeFrame(opcode));
      assert.deepEqual(await client.nextFrame(), { fin: true, opcode, data: Buffer.alloc(0) });
    });
  }

  for (
    const [kind, opcode, reply] of [["text", TEXT, "zéyx"], ["binary", BINARY, "zyx"]] as const
  ) {
    test(`a ${kind} message in fragments with a ping between them is one message`, async () => {
      const message = Buffer.from(opcode === TEXT ? "xyéz" : "xyz");
      const client = await RawClient.open(listen());
      client.socket.write(encodeFrame(opcode, message.subarray(0, 1), false));
      client.socket.write(encodeFrame(CONTINUATION, message.subarray(1, 3), false)); // half an é
      client.socket.write(encodeFrame(PING, "alive?"));
      const pong = await client.nextFrame();
      assert.equal(pong?.opcode, PONG);
      assert.equal(`${pong.data}`, "alive?");
      client.socket.write(encodeFrame(CONTINUATION, "", false));
      client.socket.write(encodeFrame(CONTINUATION, message.subarray(3)));
      const frame = await client.nextFrame();
      assert.equal(frame?.opcode, opcode);
      assert.equal(`${frame.data}`, reply);
    });
  }

  // Forgotten replies would add up to more than unreadBytes.
  test("a client that waits for each reply can send any number of messages", async () => {
    const client = await RawClient.open(listen({ limits: { unreadBytes: 100_000 } }));
    const text = "abc".repeat(100);
    const reversed = "cba".repeat(100);
    for (let i = 0; i < 2000; i++) assert.equal(await client.ask(text), reversed, `message ${i}`);
  });

  test("a client that waits for each reply can send any number of empty messages", async () => {
    const client = await RawClient.open(listen({ limits: { unreadBytes: 100_000 } }));
    for (let i = 0; i < 2000; i++) assert.equal(await client.ask(""), "", `message ${i}`);
  }, onDeno && "Deno does not tell whether empty messages have left");

  test("1,000 messages at once are answered in order", async () => {
    const messages = Array.from({ length: 1000 }, (_, n) => `message ${n}`);
    const expected = messages.map((message) => reverse(message));
    assert.deepEqual(await replies(await connect(listen()), messages), expected);
  });

  test("20,000 messages at once from a client that reads are all answered", async () => {
    const messages = Array.from({ length: 20_000 }, (_, n) => `${n}`);
    const received = await replies(await connect(await listenSeparately()), messages);
    assert.ok(received.every((reply, n) => reply === reverse(`${n}`)));
  });

  test("each of twenty clients at once gets the replies to its own messages", async () => {
    const port = listen();
    const clients = Array.from({ length: 20 }, async (_, n) => {
      const messages = Array.from({ length: 50 }, (_, i) => `${n}:${i}`);
      const received = await replies(await connect(port), messages);
      assert.deepEqual(received, messages.map((message) => reverse(message)));
    });
    await Promise.all(clients);
  });

  test("a ping is answered with a pong that has the same data", async () => {
    const client = await RawClient.open(listen());
    client.socket.write(encodeFrame(PING, "p".repeat(125)));
    const frame = await client.nextFrame();
    assert.equal(frame?.opcode, PONG);
    assert.equal(`${frame.data}`, "p".repeat(125));
  });

  test("a close frame is answered with its code, and the TCP connection ends", async () => {
    const client = await RawClient.open(listen());
    client.socket.write(closeFrame(1000));
    assert.match(await client.closeReason(), /^1000 /);
    await until(client.socket, () => undefined);
  });
});

// ---- The log and options ------------------------------------------------------------------------

/**
 * A program whose log does not go on by itself: a tenth of a second, the unit in which the log counts
 * its lines, ends only when a client of the subprotocol "next-tenth" asks for it. The server prints
 * nothing else with a timer of 100 ms.
 */
const programWithStoppedClock = (isQuiet: boolean) => `
  const { setTimeout } = globalThis;
  const tenths = [];
  globalThis.setTimeout = (callback, delay, ...args) =>
    delay === 100 ? tenths.push(callback) : setTimeout(callback, delay, ...args);
  const { serve, subprotocols } = await import("./server.ts");
  subprotocols["fails"] = () => () => { throw new Error("on purpose"); };
  subprotocols["next-tenth"] = () => () => {
    for (const endTenth of tenths.splice(0)) endTenth();
    console.log("end of the tenth");
    console.error("end of the tenth");
  };
  const { port } = serve({ port: 0, quiet: ${isQuiet} });
  console.log("Listening on http://localhost:" + port + "/");
`;

/** Starts such a program. Its port and a function that ends the tenth of a second come with it. */
async function startWithStoppedClock(isQuiet: boolean) {
  const program = startOwnProgram(programWithStoppedClock(isQuiet));
  const port = await program.port();
  const clock = await RawClient.open(port, "next-tenth");
  async function endTenth(): Promise<void> {
    clock.send("");
    await program.prints(/^end of the tenth$/m);
    await program.reports(/^end of the tenth$/m);
  }
  return { program, port, endTenth };
}

describe("the log", () => {
  test("connections, messages and replies are logged in their order", async () => {
    const program = startProgram(["--port", "0"]);
    const client = await RawClient.open(await program.port());
    const { address } = client;
    for (const message of ["Hello, world!", "", Uint8Array.of(1, 2, 3)]) await client.ask(message);
    client.socket.write(closeFrame(1000));
    await program.prints(/^closed: /m);
    assert.deepEqual(program.out.trimEnd().split("\n").slice(1), [
      `connected: ${address}, ${NAME}`,
      "received data: Hello, world!, replying: !dlrow ,olleH",
      "received data: , replying: ",
      "received data: 3 bytes, replying: 3 bytes",
      `closed: ${address}, code 1000`,
    ]);
    assert.equal(program.err, "");
  });

  test("messages that a subprotocol sends by itself are logged after their cause", async () => {
    const program = startProgram(["--port", "0"]);
    const client = await RawClient.open(await program.port(), "on-demand");
    const { address } = client;
    client.send("repeat 2 hello", "close 4001 bye");
    await program.prints(/^closed: /m);
    assert.deepEqual(program.out.trimEnd().split("\n").slice(2), [
      "received data: repeat 2 hello, replying: (nothing)",
      "sending data: hello",
      "sending data: hello",
      "received data: close 4001 bye, replying: (nothing)",
      `closed: ${address}, code 4001`,
    ]);
  });

  test("what a subprotocol sends after close() is not logged, since it is not sent", async () => {
    const program = startExtended(`
      subprotocols["late"] = (connection) => {
        connection.send("in time");
        connection.close();
        connection.send("too late");
      };
    `);
    await RawClient.open(await program.port(), "late");
    await program.prints(/^closed: .*, code 1000$/m);
    assert.match(program.out, /^sending data: in time$/m);
    assert.doesNotMatch(program.out, /too late/);
  });

  test("a reply that a subprotocol returns after close() is not logged as sent", async () => {
    const program = startExtended(`
      subprotocols["late"] = (connection) => () => {
        connection.close();
        return "too late";
      };
    `);
    const client = await RawClient.open(await program.port(), "late");
    client.send("x");
    await program.prints(/^closed: .*, code 1000$/m);
    assert.match(program.out, /^received data: x, replying: \(nothing\)$/m);
  });

  test("a client that resets its connection is logged as closed with code 1006", async () => {
    const program = startProgram(["--port", "0"]);
    const client = await RawClient.open(await program.port());
    client.socket.resetAndDestroy();
    const [, code] = await program.prints(/^closed: 127\.0\.0\.1:\d+, code (\d+)$/m);
    assert.equal(code, "1006");
  });

  test("a client whose message is too long is logged as closed with code 1009", async () => {
    const program = startProgram(["--port", "0"]);
    const client = await RawClient.open(await program.port());
    client.send(new Uint8Array(limits.messageBytes + 1));
    const [, code] = await program.prints(/^closed: 127\.0\.0\.1:\d+, code (\d+)$/m);
    assert.equal(code, "1009");
  });

  test("a client cannot make the log say 1009", async () => {
    const program = startProgram(["--port", "0"]);
    const client = await RawClient.open(await program.port());
    client.socket.write(closeFrame(1000, "Received too big message"));
    const [, code] = await program.prints(/^closed: 127\.0\.0\.1:\d+, code (\d+)$/m);
    assert.equal(code, "1000");
  });

  test("a refused handshake is logged with the reason", async () => {
    const program = startProgram(["--port", "0"]);
    await request(await program.port(), handshake({ "Sec-WebSocket-Protocol": [] }));
    await program.prints(/^refused: 127\.0\.0\.1:\d+, 400, Sec-WebSocket-Protocol must offer/m);
  });

  const shownTexts: Record<string, [string, string]> = {
    "control characters as escapes": ["\x1b[2J\r\n\x9b", "\\u001b[2J\\u000d\\u000a\\u009b"],
    "line separators and bidi controls as escapes": ["\u2028\u202e", "\\u2028\\u202e"],
    "80 letters of a longer text": ["x".repeat(81), `${"x".repeat(80)}… (length 81)`],
    "80 emoji of a longer text": ["😀".repeat(90), `${"😀".repeat(80)}… (length 180)`],
  };
  for (const [what, [text, shown]] of Object.entries(shownTexts)) {
    test(`the log shows ${what}`, async () => {
      const program = startProgram(["--port", "0"]);
      const client = await RawClient.open(await program.port(), "echo");
      await client.ask(text);
      const [, received] = await program.prints(/^received data: (.*)$/m);
      assert.equal(received, `${shown}, replying: ${shown}`);
    });
  }

  test("of a flood of messages, 100 lines are logged in 0.1 s and the rest is counted", async () => {
    const { program, port, endTenth } = await startWithStoppedClock(false);
    const client = await RawClient.open(port);
    for (let i = 0; i < 250; i++) await client.ask("x");
    await endTenth();
    const [firstTenth] = program.out.split("end of the tenth");
    assert.equal(firstTenth.match(/^(connected|received data): /gm)?.length, 100);
    assert.match(firstTenth, /^\(152 more lines\)$/m); // of 2 connections and 250 messages
  });

  test("of a flood of refused handshakes, all are answered and 100 lines are logged", async () => {
    const { program, port, endTenth } = await startWithStoppedClock(false);
    for (let i = 0; i < 150; i++) {
      const { status } = await request(port, handshake({ "Sec-WebSocket-Version": "8" }));
      assert.equal(status, 426);
    }
    await endTenth();
    assert.match(program.out, /^\(51 more lines\)$/m); // the clock's own connection is one, too
  });

  test("of a flood of failures, 100 are reported in 0.1 s and the rest is counted", async () => {
    const { program, port, endTenth } = await startWithStoppedClock(true);
    const opening = Array.from({ length: 300 }, () => RawClient.open(port, "fails"));
    for (const client of await Promise.all(opening)) {
      client.send("x");
      assert.match(await client.closeReason(), /^1011 /);
    }
    await endTenth();
    assert.match(program.err, /^\(200 more lines\)$/m);
    assert.equal(program.err.match(/^failed: /gm)?.length, 100);
  });

  test("each line goes through console.log, where Deno Deploy and debuggers see it", async () => {
    const program = startOwnProgram(`
      const { log } = console;
      console.log = (line) => log("console.log got", line);
      const { serve } = await import("./server.ts");
      const { port } = serve({ port: 0 });
      log("Listening on http://localhost:" + port + "/");
    `);
    const client = await RawClient.open(await program.port());
    await client.ask("abc");
    await program.prints(/^console\.log got received data: abc, replying: cba$/m);
  });

  test("with --quiet, only the line that says where the server listens is printed", async () => {
    const program = startProgram(["--port", "0", "--quiet"]);
    const port = await program.port();
    await assertServes(port);
    program.signal("SIGTERM");
    assert.equal(await program.exitStatus(), 0);
    assert.equal(program.out, `Listening on http://localhost:${port}/\n`);
    assert.equal(program.err, "");
  });

  test("a server whose log is on a full disk serves, refuses and stops as ever", async () => {
    const { port, stop } = serve({ port: 0, quiet: true });
    await stop(); // the port is free now
    const server = [process.execPath, ...runtimeArgs, join(here, "server.ts"), "--port", `${port}`];
    const program = new Program("sh", ["-c", 'exec "$@" >/dev/full 2>&1', "sh", ...server]);
    await eventually(() => assertServes(port), "it serves");
    const { status } = await request(port, handshake({ "Sec-WebSocket-Version": "8" }));
    assert.equal(status, 426);
    program.signal("SIGTERM");
    assert.equal(await program.exitStatus(), 0);
  }, !onLinux && "only Linux has /dev/full");
});

describe("the command line", () => {
  const absent = join(here, "absent.pem");
  const wrongFile = join(here, "index.html");
  const wrongOrigins = [
    "LOCALHOST",
    "*",
    "example.org",
    "https://a.example/a",
    "ws://a.example",
  ];
  const wrongArgs: [string[], RegExp][] = [
    [["--unknown"], /--unknown/],
    [["extra"], /extra/],
    [["--port"], /--port/],
    [["--port", "65536"], /65536/],
    [["--port", "1e3"], /1e3/],
    [["--port="], /port/],
    [["--port", "x\ny"], /port/],
    [["--port", "-1"], /--port needs a value/],
    [["--hostname="], /--hostname needs a value/],
    [["--hostname", ""], /--hostname needs a value/],
    [["--hostname", "no-such-host.invalid", "--port", "0"], /no-such-host\.invalid.*--hostname/],
    [["--hostname", "203.0.113.1", "--port", "0"], /203\.0\.113\.1.*--hostname/],
    [["--default", "nope"], /'nope'/],
    [["--quiet=yes"], /quiet/],
    [["--cert", "--key"], /--cert needs a value/],
    [["--cert", wrongFile], /--key/],
    [["--key", wrongFile], /--cert/],
    [["--cert", absent, "--key", absent], /absent\.pem/],
    [["--cert", "", "--key", ""], /--cert/],
    [["--cert", wrongFile, "--key", wrongFile], /--cert and --key must be .* in PEM/],
    [["--origin", ""], /--origin needs a value/],
    ...wrongOrigins.map((origin): [string[], RegExp] => [
      ["--origin", origin],
      /an origin must be like/,
    ]),
  ];
  for (const [args, words] of wrongArgs) {
    const shown = JSON.stringify(args).replaceAll(here, "");
    test(`the arguments ${shown} end with status 1 and one line that says why`, async () => {
      await assertCannotStart(startProgram(args), words);
    });
  }

  /** Fails unless the program ends with status 1 and one line. */
  async function assertCannotStart(program: Program, words: RegExp): Promise<void> {
    assert.equal(await program.exitStatus(), 1);
    assert.equal(program.out, "");
    assert.match(program.err, /^Cannot start: [^\n]+\n$/);
    assert.match(program.err, words);
  }

  test("a PORT that is no number ends with status 1 and one line that says why", async () => {
    await assertCannotStart(startProgram([], { PORT: "abc" }), /abc/);
  });

  test("a port in use ends with status 1 and one line that names it and --port", async () => {
    const port = listen({ hostname: "0.0.0.0" });
    const program = startProgram(["--port", `${port}`]);
    await assertCannotStart(program, new RegExp(`port ${port} is in use; try another --port`));
  });

  test("a key of another certificate ends with status 1 and one line that says so", async () => {
    const [, cert] = certificate();
    const [, , , key] = certificate();
    const program = startProgram(["--port", "0", "--cert", cert, "--key", key]);
    await assertCannotStart(program, /the --key does not belong to the --cert/);
  }, withoutOpenssl);

  for (const help of ["--help", "-h"]) {
    test(`${help} explains each option, even beside a wrong one`, async () => {
      const program = startProgram([help, "--port", "x"]);
      assert.equal(await program.exitStatus(), 0);
      const options = ["port", "hostname", "default", "origin", "cert", "key", "reuse-port"];
      for (const option of [...options, "quiet", "help"]) {
        assert.match(program.out, new RegExp(`^ +--${option} +\\S`, "m"));
      }
    });
  }

  test("the server listens on the PORT of the environment", async () => {
    const program = startProgram([], { PORT: "0" });
    await assertServes(await program.port());
  });

  test("--port comes before PORT", async () => {
    const program = startProgram(["--port", "0"], { PORT: "1" });
    await assertServes(await program.port());
  });

  test("a PORT that Deno may not read is passed over, with one line that says so", async () => {
    const args = ["run", "--no-prompt", "--allow-net", join(here, "server.ts")];
    const unreachable = ["--hostname", "203.0.113.1"]; // so that it does not start on port 9000
    const program = new Program(process.execPath, [...args, ...unreachable], { PORT: "1" });
    assert.equal(await program.exitStatus(), 1);
    assert.match(
      program.err,
      /^PORT is ignored, if set: .*--allow-env=PORT\nCannot start: [^\n]*\n$/,
    );
  }, !onDeno && "Bun may read every variable");

  test("--hostname is the address on which the server listens, and which it prints", async () => {
    const program = startProgram(["--port", "0", "--hostname", "127.0.0.1"]);
    const port = await program.port();
    assert.equal(program.out, `Listening on http://127.0.0.1:${port}/\n`);
    await assertServes(port);
  });

  const hasIpv6 = Object.values(networkInterfaces()).flat().some((entry) =>
    entry?.address === "::1"
  );
  test("--hostname takes an IPv6 address with or without brackets", async () => {
    for (const hostname of ["::1", "[::1]"]) {
      const program = startProgram(["--port", "0", "--hostname", hostname]);
      const port = await program.port();
      assert.equal(program.out, `Listening on http://[::1]:${port}/\n`);
    }
  }, !hasIpv6 && "this machine has no IPv6");

  test("--default NAME serves clients that offer no subprotocol", async () => {
    const port = await startProgram(["--port", "0", "--default", "echo"]).port();
    const client = await RawClient.openWith(port, handshake({ "Sec-WebSocket-Protocol": [] }));
    assert.equal(await client.ask("same"), "same");
  });

  test("--origin refuses pages of other origins, and lets in clients without an origin", async () => {
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
      const response = await request(port, handshake({ Origin: origin }));
      assert.equal(response.status, status, `Origin: ${origin}`);
    }
  });

  test("--reuse-port lets two processes listen on one port", async () => {
    const port = await startProgram(["--port", "0", "--reuse-port"]).port();
    const second = startProgram(["--port", `${port}`, "--reuse-port"]);
    assert.equal(await second.port(), port);
  }, !onLinux && "only Linux shares the connections of a port between processes");
});

describe("serve()", () => {
  test("serve() throws an Error that names a limit that does not exist", () => {
    const misspelled = { mesageBytes: 5 } as Options["limits"];
    assert.throws(() => serve({ port: 0, limits: misspelled }), /no limit named mesageBytes/);
  });

  test("importing server.ts starts nothing", async () => {
    const code = `await import(${JSON.stringify(new URL("server.ts", import.meta.url))})`;
    const program = new Program(process.execPath, [onDeno ? "eval" : "-e", code]);
    assert.equal(await program.exitStatus(), 0);
    assert.equal(program.out + program.err, "");
  });

  test("an undefined option is the same as none", async () => {
    const limits = { messageBytes: undefined };
    const port = listen({ hostname: undefined, reusePort: undefined, limits });
    await assertServes(port);
    assert.throws(() => serve({ port, reusePort: undefined }), /in use/);
    const connecting = once(connectTcp(port, "::1"), "connect");
    await assert.rejects(connecting, "it listens on more than 0.0.0.0");
  });

  const wrongOptions: [Options, RegExp][] = [
    [{ port: 65536 }, /a port must be a whole number from 0 to 65535, not 65536/],
    [{ port: NaN }, /a port must be a whole number from 0 to 65535, not NaN/],
    [{ defaultSubprotocol: "nope" }, /must be one of: dumb-increment-protocol, .*'nope'/],
    [{ origins: ["*"] }, /an origin must be like .*'\*'/],
    [{ origins: [""] }, /an origin must be like .*''/],
    [{ hostname: "" }, /a hostname must not be empty/],
    [{ cert: "x" }, /must be given together/],
  ];
  for (const [options, words] of wrongOptions) {
    const [name, value] = Object.entries(options)[0];
    test(`serve() throws an Error that explains what is wrong with ${name}: ${value}`, () => {
      assert.throws(() => serve({ port: 0, ...options }), words);
    });
  }

  test("serve() throws an Error that names the port if it is in use", () => {
    const port = listen();
    const inUse = new RegExp(`port ${port} is in use`);
    assert.throws(() => serve({ port, hostname: "127.0.0.1" }), inUse);
  });

  test("an option that serve() does not have is a type error", async () => {
    const code = 'import { serve } from "./server.ts"; serve({ help: true });';
    const file = join(copyServer({ "program.ts": code }), "program.ts");
    const program = new Program(process.execPath, ["check", file]);
    assert.equal(await program.exitStatus(), 1);
    assert.match(program.err, /'help' does not exist in type 'Options'/);
  }, !onDeno && "Bun does not check types");

  test("an exception in a timer ends a program of one's own, as without a server", async () => {
    const program = startOwnProgram(`
      import { serve } from "./server.ts";
      serve({ port: 0, quiet: true });
      setTimeout(() => { throw new Error("thrown by a timer"); });
      setTimeout(() => process.exit(0), 5000); // if the exception has not ended it
    `);
    assert.equal(await program.exitStatus(), 1);
    assert.match(program.err, /thrown by a timer/);
  });
});

describe("TLS", () => {
  /** Connects by TLS. */
  const connectSecurely = (port: number) =>
    new RawClient(connectTls({ port, host: "127.0.0.1", rejectUnauthorized: false }));

  /** Sends a request without a body by HTTP/2; returns the headers and the body. */
  async function requestHttp2(
    port: number,
    method: string,
  ): Promise<[IncomingHttpHeaders, string]> {
    const client = connectHttp2(`https://localhost:${port}`, { rejectUnauthorized: false });
    cleanups.push(() => client.destroy());
    const stream = client.request({ ":method": method, ":path": "/" }, { endStream: true });
    const [headers] = await once(stream, "response");
    const chunks = await Array.fromAsync(stream);
    return [headers, chunks.join("")];
  }

  test("with --cert and --key, the server says that it listens on https", async () => {
    const program = startProgram(["--port", "0", ...certificate()]);
    const port = await program.port();
    assert.equal(program.out, `Listening on https://localhost:${port}/\n`);
  }, withoutOpenssl);

  test("with --cert and --key, the page comes by https", async () => {
    const port = await startProgram(["--port", "0", ...certificate()]).port();
    const client = connectSecurely(port);
    client.socket.write("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    const response = await client.nextResponse();
    assert.equal(response?.body, page);
  }, withoutOpenssl);

  test("with --cert and --key, messages are answered by wss", async () => {
    const port = await startProgram(["--port", "0", ...certificate()]).port();
    const client = connectSecurely(port);
    client.socket.write(handshake());
    const response = await client.nextResponse();
    assert.equal(response?.status, 101);
    assert.equal(await client.ask("secret"), "terces");
  }, withoutOpenssl);

  test("the page also comes by HTTP/2, which browsers prefer", async () => {
    const port = await startProgram(["--port", "0", ...certificate()]).port();
    const [headers, body] = await requestHttp2(port, "GET");
    assert.equal(headers[":status"], 200);
    assert.equal(body, page);
  }, withoutOpenssl);

  test("a POST without a body by HTTP/2 is answered with 405", async () => {
    const port = await startProgram(["--port", "0", ...certificate()]).port();
    const [headers] = await requestHttp2(port, "POST");
    assert.equal(headers[":status"], 405);
    assert.equal(headers.allow, "GET, HEAD");
  }, withoutOpenssl);
});

// ---- Limits -------------------------------------------------------------------------------------

describe("limits", () => {
  /** Encodes data as two frames. */
  const fragments = (opcode: number, data: Buffer) => {
    const half = Math.floor(data.length / 2);
    const first = encodeFrame(opcode, data.subarray(0, half), false);
    const second = encodeFrame(CONTINUATION, data.subarray(half));
    return Buffer.concat([first, second]);
  };
  const encodings: Record<string, (size: number) => Buffer> = {
    "text": (size) => encodeFrame(TEXT, "é".repeat(size / 2) + "x".repeat(size % 2)),
    "bytes": (size) => encodeFrame(BINARY, Buffer.alloc(size)),
    "text in fragments": (size) => fragments(TEXT, Buffer.alloc(size, "x")),
    "bytes in fragments": (size) => fragments(BINARY, Buffer.alloc(size)),
  };
  for (const [kind, encode] of Object.entries(encodings)) {
    test(`1 MiB of ${kind} is answered; one byte more is closed with 1009`, async () => {
      const client = await RawClient.open(listen());
      client.socket.write(encode(1024 * 1024));
      assert.equal((await client.nextFrame())?.data.length, 1024 * 1024);
      client.socket.write(encode(1024 * 1024 + 1));
      const frame = await client.nextFrame();
      assert.equal(frame?.opcode, CLOSE);
      assert.equal(frame.data.readUInt16BE(), 1009);
    });
  }

  test("two servers in one process have limits of their own", async () => {
    const small = await RawClient.open(listen({ limits: { messageBytes: 10 } }));
    const large = await RawClient.open(listen());
    const text = "x".repeat(11);
    small.send(text);
    assert.match(await small.closeReason(), /^1009 ./);
    assert.equal(await large.ask(text), text);
  });

  test("with messageBytes of 16 MiB, messages of 13 MB are answered one after the other", async () => {
    const client = await RawClient.open(listen({ limits: { messageBytes: 16 * 1024 * 1024 } }));
    const frame = encodeFrame(BINARY, Buffer.alloc(13_000_000));
    for (let i = 0; i < 2; i++) {
      client.socket.write(frame);
      assert.equal((await client.nextFrame())?.data.length, 13_000_000);
    }
  });

  for (const unreadBytes of [1, 20, 31]) {
    test(`with unreadBytes of ${unreadBytes}, a client that waits for replies is served`, async () => {
      const port = listen({ limits: { unreadBytes, allUnreadBytes: unreadBytes } });
      const client = await RawClient.open(port);
      for (let i = 0; i < 100; i++) assert.equal(await client.ask("ab"), "ba", `message ${i}`);
    });
  }

  const ranges: [keyof typeof limits, number, number][] = [
    ["messageBytes", 1, 64 * 1024 * 1024 - 1],
    ["unreadBytes", 1, 2 ** 40],
    ["allUnreadBytes", 1, 2 ** 40],
    ["connections", 1, 2 ** 40],
    ["idleSeconds", 8, 960],
    ["stopSeconds", 0, 3600],
  ];
  for (const [name, least, greatest] of ranges) {
    test(`limits.${name} may be ${least} and ${greatest}`, async () => {
      for (const value of [least, greatest]) {
        const client = await RawClient.open(listen({ limits: { [name]: value } }));
        assert.equal(await client.ask("x"), "x");
        client.socket.destroy();
      }
    });

    test(`any other value of limits.${name} is refused with the range`, () => {
      const range = new RegExp(
        `limits.${name} must be a whole number from ${least} to ${greatest},`,
      );
      for (const value of [least - 1, greatest + 1, least + 0.5, NaN, Infinity]) {
        assert.throws(() => serve({ port: 0, limits: { [name]: value } }), range, `${value}`);
      }
    });
  }
});

describe("slow readers", () => {
  /** Keeps messages under way and reads slowly. Returns the number of replies, or why it ended. */
  async function readSlowly(port: number, count: number, underWayBytes: number): Promise<string> {
    const client = await RawClient.open(port);
    const size = 1000;
    const underWayCount = Math.floor(underWayBytes / size);
    let sent = 0;
    let received = 0;
    while (received < count) {
      const next = Math.min(count, received + underWayCount);
      const messages = Array.from({ length: next - sent }, (_, i) => `${sent + i}`.padEnd(size));
      client.send(...messages);
      sent = next;
      const frame = await client.nextFrame();
      if (!frame) return `cut after ${received} replies`;
      if (frame.opcode === CLOSE) return `closed with ${frame.data.readUInt16BE()}`;
      assert.equal(`${frame.data}`.trim(), [...`${received}`].reverse().join(""));
      received++;
      if (received % 100 === 0) {
        client.socket.pause();
        await sleep(5); // this is what makes it slow
        client.socket.resume();
      }
    }
    return `${received} replies`;
  }

  const cannotPause = onDeno && "Deno cannot stop reading from a client";
  const pauses = !onDeno && "Bun stops reading from such a client instead";

  test("a client that always has 4 MB under way and reads slowly gets every reply", async () => {
    const result = await readSlowly(await listenSeparately(), 15_000, 4_000_000);
    assert.equal(result, "15000 replies");
  });

  test("a client that always has 20 MB under way and reads slowly gets every reply", async () => {
    const result = await readSlowly(await listenSeparately(), 25_000, 20_000_000);
    assert.equal(result, "25000 replies");
  }, cannotPause);

  test("50,000 messages at once from a client that reads are all answered", async () => {
    const messages = Array.from({ length: 50_000 }, (_, n) => `${n}`);
    const received = await replies(await connect(await listenSeparately()), messages);
    assert.ok(received.every((reply, n) => reply === reverse(`${n}`)));
  }, cannotPause);

  test("300 messages of 64 KiB at once from a client that reads are all answered", async () => {
    const messages = Array(300).fill("x".repeat(65_536));
    const received = await replies(await connect(await listenSeparately()), messages);
    assert.deepEqual(new Set(received), new Set(messages));
  });

  test(
    "on-demand commands at once are all done, even if their replies pass the limit",
    async () => {
      const port = listen({ limits: { unreadBytes: 4 * 1024 * 1024 } });
      const socket = await connect(port, "on-demand");
      const received = await replies(socket, Array(20).fill("bytes 1000000"));
      for (const reply of received) assert.equal((reply as ArrayBuffer).byteLength, 1_000_000);
    },
    cannotPause,
  );

  for (const size of [65_536, 16, 0]) {
    test(
      `a client that floods messages of ${size} bytes and does not read is closed`,
      async () => {
        let isClosed = false;
        const echo: Subprotocol = (connection) => {
          connection.onclose = () => void (isClosed = true);
          return (message) => message;
        };
        const port = listenWith(echo, { limits: { unreadBytes: 4 * 1024 * 1024 } });
        const other = await RawClient.open(port);
        const flooding = await RawClient.open(port, "added");
        flooding.socket.pause();
        const messages = Array(size > 16 ? 4 : 5000).fill(new Uint8Array(size));
        for (let i = 0; i < 500 && !isClosed; i++) {
          flooding.send(...messages);
          await assertReplies(other);
        }
        assert.ok(isClosed, "it was not closed");
        await assertReplies(other);
        flooding.socket.resume();
        assert.match(await flooding.closeReason(), /^1008 .|^cut$/); // the flood may go on meanwhile
      },
      pauses,
    );
  }

  test("a client that floods and does not read is closed with 1008 after idleSeconds", async () => {
    const { promise, resolve } = Promise.withResolvers<void>();
    const echo: Subprotocol = (connection) => {
      connection.onclose = resolve;
      return (message) => message;
    };
    const port = listenWith(echo, { limits: { idleSeconds: 8 } });
    const flooding = await RawClient.open(port, "added");
    flooding.socket.pause();
    flooding.send(...Array(400).fill(new Uint8Array(65_536)));
    await promise;
    await assertServes(port);
    flooding.socket.resume();
    assert.match(await flooding.closeReason(), /^1008 too many unread/);
  }, onDeno && "Deno closes such a client at once");

  test("a client over the limit that goes on reading gets 1008, not a reset", async () => {
    const client = await RawClient.open(listen({ limits: { unreadBytes: 500_000 } }));
    client.send(...Array(3000).fill("x".repeat(1000)));
    assert.equal(await client.closeReason(), "1008 too many unread messages");
  }, pauses);

  test("a handler that sends too much at once is closed with 1008", async () => {
    const { promise, resolve } = Promise.withResolvers<void>();
    const port = listenWith((connection) => {
      connection.onclose = resolve;
      return (message) => {
        for (let i = 0; i < 100; i++) connection.send(message);
      };
    }, { limits: { unreadBytes: 1024 * 1024 } });
    const client = await RawClient.open(port, "added");
    client.socket.pause();
    client.send(...Array(10).fill(new Uint8Array(200_000)));
    await promise;
    client.socket.resume();
    assert.match(await client.closeReason(), /^1008 ./);
  });

  test("a client that does not read what a timer sends is closed with 1008", async () => {
    const { promise, resolve } = Promise.withResolvers<void>();
    let sent = 0;
    const port = listenWith((connection) => {
      const timer = setInterval(() => {
        connection.send(new Uint8Array(1024 * 1024));
        sent++;
      }, 5);
      connection.onclose = () => {
        clearInterval(timer);
        resolve();
      };
    }, { limits: { unreadBytes: 8 * 1024 * 1024 } });
    const client = await RawClient.open(port, "added");
    client.socket.pause();
    await promise;
    assert.ok(sent > 8 && sent < 40, `${sent} MiB, of which the kernel holds some`);
    client.socket.resume();
    assert.match(await client.closeReason(), /^1008 ./);
  });

  test("what a client has left unread counts no more once the client is gone", async () => {
    const { promise, resolve } = Promise.withResolvers<void>();
    let ended = 0;
    const sixMegabytes: Subprotocol = (connection) => {
      connection.onclose = () => {
        ended++;
        if (ended === 8) resolve();
      };
      return () => {
        for (let i = 0; i < 60; i++) connection.send(new Uint8Array(100_000));
      };
    };
    const port = listenWith(sixMegabytes, { limits: { allUnreadBytes: 16 * 1024 * 1024 } });
    for (let i = 0; i < 8; i++) {
      const silent = await RawClient.open(port, "added");
      silent.send("go");
      await silent.nextFrame();
      silent.socket.resetAndDestroy();
    }
    await promise;
    const reading = await connect(port, "added");
    const received = collect(reading, 60);
    reading.send("go");
    await received;
  });

  test("when all clients together leave too much unread, those behind are closed", async () => {
    let closed = 0;
    const thirtyMebibytes: Subprotocol = (connection) => {
      connection.onclose = () => void closed++;
      for (let i = 0; i < 30; i++) {
        setTimeout(() => connection.send(new Uint8Array(1024 * 1024)), 10 * i);
      }
    };
    const limits = { allUnreadBytes: 8 * 1024 * 1024, unreadBytes: 1024 * 1024 * 1024 };
    const port = listenWith(thirtyMebibytes, { limits });
    const clients = await Promise.all([1, 2, 3, 4].map(() => RawClient.open(port, "added")));
    for (const { socket } of clients) socket.pause();
    await eventually(() => assert.ok(closed >= 3, `${closed}`), "three are closed");
    await assertServes(port);
  });

  test("what all clients have read does not count against the limit for all", async () => {
    const sixMegabytes: Subprotocol = (connection) => () => {
      for (let i = 0; i < 6; i++) connection.send(new Uint8Array(1_000_000));
    };
    const port = listenWith(sixMegabytes, { limits: { allUnreadBytes: 12 * 1024 * 1024 } });
    const client = await connect(port, "added");
    for (let i = 0; i < 25; i++) {
      const received = collect(client, 6);
      client.send("go");
      await received;
    }
  });

  test("a closed client that reads slowly, and sends, gets all before the close frame", async () => {
    const count = 20;
    const port = listenWith((connection) => () => {
      for (let i = 0; i < count; i++) connection.send(new Uint8Array(1_000_000));
      connection.close(4001, "bye");
    });
    const client = await RawClient.open(port, "added");
    client.send("go");
    for (let i = 0; i < count; i++) {
      assert.equal((await client.nextFrame())?.data.length, 1_000_000, `message ${i}`);
      client.socket.pause();
      if (i < count / 2) client.send("still here");
      await sleep(100);
      client.socket.resume();
    }
    assert.equal(await client.closeReason(), "4001 bye");
  });

  test("what a client sends before its close frame is received, however much is unread", async () => {
    let count = 0;
    const port = listenWith((connection) => (message) => {
      if (message === "send") connection.send(new Uint8Array(1_000_000));
      if (message === "count") count++;
    });
    const client = await RawClient.open(port, "added");
    client.socket.pause();
    const texts = [...Array(10).fill("send"), ...Array(5).fill("count")];
    const frames = texts.map((text) => encodeFrame(TEXT, Buffer.from(text)));
    client.socket.write(Buffer.concat([...frames, closeFrame(1000)]));
    await eventually(() => assert.equal(count, 5), "five messages are counted");
  });

  test("when others leave too much unread, a client that reads is not closed", async () => {
    const sixteenMebibytes: Subprotocol = (connection) => {
      connection.send(new Uint8Array(16 * 1024 * 1024));
    };
    const port = listenWith(sixteenMebibytes, { limits: { allUnreadBytes: 1024 * 1024 } });
    const silent = await RawClient.open(port, "added");
    silent.socket.pause();
    const reading = await RawClient.open(port, "echo");
    const text = "x".repeat(200_000);
    for (let i = 0; i < 5; i++) assert.ok(await reading.ask(text) === text, `message ${i}`);
  });
});

describe("the number of connections", () => {
  const assertFull = async (port: number) => {
    const { status, header } = await request(port, handshake());
    assert.equal(status, 503);
    assert.ok(Number(header("retry-after")[0]) > 0);
  };

  test("a full server refuses handshakes with 503 and a time to try again", async () => {
    const port = listen({ limits: { connections: 1 } });
    await RawClient.open(port);
    await assertFull(port);
  });

  const endings: Record<string, (socket: Socket) => unknown> = {
    "with a close frame": (socket) => socket.write(closeFrame(1000)),
    "at the end of its TCP stream": (socket) => socket.end(),
    "with a reset": (socket) => socket.resetAndDestroy(),
    "with an illegal frame": (socket) => socket.write(Buffer.alloc(20, 255)),
    "with text that is not UTF-8": (socket) => socket.write(encodeFrame(TEXT, Uint8Array.of(255))),
  };
  for (const [how, end] of Object.entries(endings)) {
    test(`a connection that ends ${how} makes room for exactly one other`, async () => {
      const port = listen({ limits: { connections: 2 } });
      await RawClient.open(port);
      const ending = await RawClient.open(port);
      await assertFull(port);
      end(ending.socket);
      await eventually(() => RawClient.open(port), "there is room");
      await assertFull(port);
    });
  }

  test("a client closed with 1009 counts until it has left", async () => {
    const port = listen({ limits: { connections: 1 } });
    const client = await RawClient.open(port);
    client.send(new Uint8Array(limits.messageBytes + 1));
    assert.match(await client.closeReason(), /^1009 ./);
    await assertFull(port);
    client.socket.destroy();
    await eventually(() => assertServes(port), "there is room");
  }, !onDeno && "Bun itself ends the TCP connection of such a client");

  test("a client closed with much unread still counts, as it still takes memory", async () => {
    const { promise, resolve } = Promise.withResolvers<void>();
    const port = listenWith((connection) => {
      connection.onclose = resolve;
      return () => {
        connection.send(new Uint8Array(20_000_000)); // more than the kernel's buffers hold
        connection.send("closes the connection, since too much is unread");
      };
    }, { limits: { connections: 1, unreadBytes: 1024 * 1024 } });
    const client = await RawClient.open(port, "added");
    client.socket.pause();
    client.send("go");
    await promise;
    for (let i = 0; i < 20; i++) {
      client.send("Deno cuts the connection when it has sent the close frame and gets this");
      await sleep(100);
      await assertFull(port);
    }
  });

  test("a client that closes with much unread still counts, as it still takes memory", async () => {
    const { promise, resolve } = Promise.withResolvers<void>();
    const port = listenWith((connection) => {
      connection.onclose = resolve;
      return () => connection.send(new Uint8Array(20_000_000)); // more than the kernel holds
    }, { limits: { connections: 1 } });
    const client = await RawClient.open(port, "added");
    client.socket.pause();
    client.socket.write(Buffer.concat([encodeFrame(TEXT, Buffer.from("go")), closeFrame(1000)]));
    await promise;
    for (let i = 0; i < 10; i++) {
      await sleep(100);
      await assertFull(port);
    }
  }, onDeno && "Deno frees the memory when the client closes");

  test("of twenty handshakes at once, no more stay than there is room for", async () => {
    const port = listen({ limits: { connections: 3 } });
    const clients = Array.from({ length: 20 }, () => RawClient.to(port));
    for (const { socket } of clients) socket.write(handshake());
    const responses = await Promise.all(clients.map((client) => client.nextResponse()));
    const accepted = clients.filter((_client, i) => responses[i]?.status === 101);
    const received = await Promise.all(accepted.map((client) => client.ask("stay")));
    assert.equal(received.filter((reply) => reply === "yats").length, 3);
    await eventually(() => assertFull(port), "the server is full");
  });

  test("a client that answers no pings makes room for another; one that does stays", async () => {
    const port = listen({ limits: { idleSeconds: 8, connections: 2 } });
    const living = await connect(port);
    const dead = await RawClient.open(port);
    await dead.closeReason();
    await eventually(() => RawClient.open(port), "there is room");
    await assertFull(port);
    assert.deepEqual(await replies(living, ["alive"]), ["evila"]);
  });

  test("a client that resets before the response to its handshake takes no room", async () => {
    const port = listen({ limits: { connections: 1 } });
    for (let i = 0; i < 10; i++) {
      const { socket } = RawClient.to(port);
      socket.write(handshake(), () => socket.resetAndDestroy());
      await once(socket, "close");
    }
    await eventually(() => assertServes(port), "there is room");
  });
});

// ---- Failures -----------------------------------------------------------------------------------

describe("failing subprotocols", () => {
  const failingSubprotocols = `
    const fail = (what: string) => { throw new Error(what); };
    const unprintable = { [Symbol.for("nodejs.util.inspect.custom")]: () => fail("hidden") };
    Object.assign(subprotocols, {
      "message-throws": () => () => fail("thrown in message"),
      "open-throws": () => fail("thrown in open"),
      "throws-the-unprintable": () => () => { throw unprintable; },
      "repeats": () => (message: Message) => fail(String(message)),
      "is-async": () => async (message: Message) => message,
      "opens-async": async () => {},
      "rejects": () => async () => fail("rejected at once"),
      "gives-a-number": () => () => 5,
      "long-reason": (connection: Connection) => connection.close(1000, "é".repeat(62)),
      "close-throws": (connection: Connection) => { connection.onclose = () => fail("in close"); },
      "close-is-async": (connection: Connection) => {
        connection.onclose = async () => fail("in async close");
      },
      "timer-throws": () => void setTimeout(() => fail("in a timer")),
      "promise-rejects": () => void Promise.reject(new Error("in a promise")),
    });`;

  // Each with the name of its subprotocol, a name for the test, and what is reported.

  const openFailures: [string, string, RegExp][] = [
    ["open-throws", "whose opening throws", /^ +Error: thrown in open\n +at .*server\.ts/m],
    ["opens-async", "whose opening is async", /TypeError: .* must not be async/],
    ["long-reason", "whose opening closes with too long a reason", /RangeError: .*123 bytes/],
  ];
  for (const [name, what, error] of openFailures) {
    test(`a connection ${what} is reported and closed with 1011; others go on`, async () => {
      const program = startExtended(failingSubprotocols, ["--quiet"]);
      const port = await program.port();
      const other = await RawClient.open(port);
      const client = await RawClient.open(port, name);
      const { address } = client;
      assert.match(await client.closeReason(), /^1011 ./);
      await program.reports(/^failed: .*\n/);
      assert.match(program.err, error);
      const [report] = program.err.match(/^failed: .*$/m)!;
      assert.equal(report, `failed: ${address}, ${name}`);
      await assertReplies(other);
    });
  }

  const messageFailures: [string, string, RegExp][] = [
    ["message-throws", "throws", /^ +Error: thrown in message\n +at .*server\.ts/m],
    ["throws-the-unprintable", "throws what cannot be shown", /an error that cannot be shown/],
    ["is-async", "is async", /TypeError: .* must not be async/],
    ["rejects", "is async and rejects", /TypeError: .* must not be async/],
    ["gives-a-number", "returns a number", /TypeError: a message must be a string or a Uint8Array/],
  ];
  for (const [name, what, error] of messageFailures) {
    test(`a connection whose handler ${what} is reported and closed with 1011; others go on`, async () => {
      const program = startExtended(failingSubprotocols, ["--quiet"]);
      const port = await program.port();
      const other = await RawClient.open(port);
      const client = await RawClient.open(port, name);
      const { address } = client;
      client.send("a\nb");
      assert.match(await client.closeReason(), /^1011 ./);
      await program.reports(/^failed: .*\n/);
      assert.match(program.err, error);
      const [report] = program.err.match(/^failed: .*$/m)!;
      assert.equal(report, `failed: ${address}, ${name}, message: a\\u000ab`);
      await assertReplies(other);
    });
  }

  const laterFailures: [string, string, RegExp][] = [
    ["close-throws", "an exception in onclose", /Error: in close\n +at /],
    ["close-is-async", "an async onclose that rejects", /Error: in async close\n +at /],
    ["timer-throws", "an exception in a timer", /Error: in a timer\n +at /],
    ["promise-rejects", "a rejected promise", /Error: in a promise\n +at /],
  ];
  for (const [name, what, error] of laterFailures) {
    test(`${what} is reported, and server.ts goes on serving`, async () => {
      const program = startExtended(failingSubprotocols);
      const port = await program.port();
      const other = await RawClient.open(port);
      const client = await RawClient.open(port, name);
      client.socket.end();
      await program.reports(error);
      await assertReplies(other);
    });
  }

  test("a client's text in a report can neither steer the terminal nor forge a report", async () => {
    const program = startExtended(failingSubprotocols);
    const client = await RawClient.open(await program.port(), "repeats");
    client.send("\x1b[2J\nfailed: forged\x9b");
    assert.match(await client.closeReason(), /^1011 ./);
    await program.reports(/at /);
    assert.match(program.err, /\\u001b\[2J\n +failed: forged\\u009b\n/);
    assert.equal(program.err.match(/^failed: /gm)?.length, 1);
  });

  test("a connection that fails as it opens is logged as connected, then as closed", async () => {
    const program = startExtended(failingSubprotocols);
    const client = await RawClient.open(await program.port(), "open-throws");
    await client.closeReason();
    await program.prints(/^closed: .*, code 1011$/m);
    assert.match(program.out, /^connected: .*, open-throws\nclosed: /m);
  });

  test("the message that made a handler fail is logged before the end it causes", async () => {
    const program = startExtended(failingSubprotocols);
    const client = await RawClient.open(await program.port(), "message-throws");
    client.send("boom");
    await client.closeReason();
    await program.prints(/^closed: .*, code 1011$/m);
    assert.match(program.out, /^connected: .*\nreceived data: boom, failing\nclosed: /m);
  });
});

describe("hostile clients", () => {
  const random = randomNumbers(11);
  const randomBytes = (count: number) =>
    Buffer.from(Array.from({ length: count }, () => random(256)));
  const damage = (data: Buffer) => {
    for (let i = 0; i < 3; i++) data[random(data.length)] = random(256);
    return data;
  };
  const afterHandshake = (...frames: Buffer[]) =>
    Buffer.concat([Buffer.from(handshake()), ...frames]);
  const nonBlank = { Upgrade: "\xa0websocket", Connection: "\xa0Upgrade" };
  const longFrame = encodeFrame(TEXT, "x".repeat(70_000));
  const attacks: Record<string, () => Buffer> = {
    "random bytes": () => randomBytes(random(2000)),
    "half a request": () => Buffer.from(handshake().slice(0, random(200))),
    "a damaged request": () => damage(Buffer.from(handshake())),
    "a no-break space in a header": () => Buffer.from(handshake(nonBlank), "latin1"),
    "a long header": () => Buffer.from(handshake({ "X-Long": "x".repeat(random(200_000)) })),
    "random frames": () => afterHandshake(randomBytes(random(2000))),
    "a damaged frame": () =>
      afterHandshake(damage(encodeFrame(random(16), randomBytes(random(200))))),
    "half a frame": () => afterHandshake(longFrame.subarray(0, random(70_000))),
    "many pings": () => afterHandshake(...Array(random(2000)).fill(encodeFrame(PING, "x"))),
  };
  for (const [what, encodeAttack] of Object.entries(attacks)) {
    test(`a hundred clients that send ${what} and leave do not disturb the others`, async () => {
      const port = listen();
      const other = await RawClient.open(port);
      const attack = async () => {
        const { socket } = RawClient.to(port);
        const written = new Promise((resolve) => socket.write(encodeAttack(), resolve));
        await Promise.race([written, once(socket, "close")]);
        if (random(2) === 0) socket.resetAndDestroy();
        else socket.end();
      };
      for (let round = 0; round < 10; round++) {
        await Promise.all(Array.from({ length: 10 }, attack));
      }
      await assertReplies(other);
      await assertServes(port);
    });
  }

  test(
    "running out of file descriptors neither stops the server nor closes open connections",
    async () => {
      const server = [...runtimeArgs, join(here, "server.ts"), "--port", "0", "--quiet"];
      const shellLine = 'ulimit -n 60; exec "$0" "$@"';
      const program = new Program("sh", ["-c", shellLine, process.execPath, ...server]);
      const port = await program.port();
      const other = await RawClient.open(port);
      const crowd = Array.from({ length: 100 }, () => RawClient.to(port));
      for (const { socket } of crowd) socket.write(handshake());
      const responses = crowd.map((client) => client.nextResponse());
      await Promise.any(
        responses.map(async (response) => assert.equal((await response)?.status, 101)),
      );
      await assertReplies(other);
      for (const { socket } of crowd) socket.destroy();
      const accepted = (await Promise.all(responses)).filter((response) =>
        response?.status === 101
      );
      assert.ok(accepted.length < 100, "it did not run out of file descriptors");
      await eventually(() => assertServes(port), "it serves again");
      await assertReplies(other);
      if (onDeno) await program.reports(/^stopped listening: .*\nlistening again$/m);
    },
    !onLinux && "it takes Linux to count file descriptors as here",
  );
});

// ---- Stopping -----------------------------------------------------------------------------------

describe("stopping", () => {
  const STOP_REASON = "1001 the server is stopping";

  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    test(`${signal} closes all clients with 1001 and ends the server with status 0`, async () => {
      const program = startProgram(["--port", "0"]);
      const port = await program.port();
      const answering = await connect(port);
      const silent = await RawClient.open(port);
      const half = RawClient.to(port);
      half.socket.write("GET / HTTP/1.1\r\n");
      const closed = once(answering, "close");
      program.signal(signal);
      const [{ code, reason }] = await closed;
      assert.equal(`${code} ${reason}`, STOP_REASON);
      assert.equal(await silent.closeReason(), STOP_REASON);
      assert.equal(await program.exitStatus(), 0);
      assert.equal(program.out.match(/code 1001/g)?.length, 2);
      assert.equal(program.err, "");
    });
  }

  test("two signals at once are the same as one", async () => {
    const program = startProgram(["--port", "0"]);
    const client = await RawClient.open(await program.port());
    program.signal("SIGINT");
    program.signal("SIGINT");
    assert.equal(await client.closeReason(), STOP_REASON);
    assert.equal(await program.exitStatus(), 0);
  });

  test("a second signal after more than half a second ends the server at once", async () => {
    const source = readFileSync(join(here, "server.ts"), "utf8");
    const patient = source.replace("stopSeconds: 1,", "stopSeconds: 20,");
    const file = join(copyServer({ "server.ts": patient }), "server.ts");
    const program = startProgram(["--port", "0"], {}, file);
    const client = await RawClient.open(await program.port()); // does not answer the close frame
    program.signal("SIGTERM");
    assert.equal(await client.closeReason(), STOP_REASON);
    await sleep(600); // since the server has heard the first signal
    program.signal("SIGTERM");
    assert.equal(await program.exitStatus(), 1);
  }, !onDeno && "Bun does not wait for the clients, so it has stopped before");

  /** Starts a task of deno.json in a process group of its own, as a shell does. */
  function startTask(name: string): Program {
    const args = ["task", name, "--port", "0"];
    const program = new Program(process.execPath, args, {}, { detached: true });
    cleanups.push(() => interrupt(program, "SIGKILL"));
    return program;
  }

  /** Sends a signal to each process of a task, as a terminal does at Ctrl+C. */
  function interrupt(program: Program, signal: "SIGINT" | "SIGKILL"): void {
    try {
      process.kill(-program.child.pid!, signal);
    } catch (error) {
      if ((error as { code?: string }).code !== "ESRCH") throw error; // they have ended already
    }
  }

  for (const task of ["start", "dev"]) {
    test(`Ctrl+C under deno task ${task} closes all clients with 1001, status 0`, async () => {
      const program = startTask(task);
      const client = await RawClient.open(await program.port());
      interrupt(program, "SIGINT");
      assert.equal(await client.closeReason(), STOP_REASON);
      assert.equal(await program.exitStatus(), 0);
      assert.doesNotMatch(program.err, /error|rejection|not reachable/i);
    }, !onDeno && "deno task runs the server on Deno");
  }

  test("stop() closes all clients with 1001 and frees the port", async () => {
    const server = startServer();
    const client = await RawClient.open(server.port);
    await server.stop();
    assert.equal(await client.closeReason(), STOP_REASON);
    await assertServes(listen({ port: server.port }));
  });

  test("stop() while Deno has no file descriptors left is not followed by a restart", async () => {
    const denoServe = Deno.serve;
    cleanups.push(() => Deno.serve = denoServe);
    let starts = 0;
    const serveAndFail = (options: Deno.ServeTcpOptions, handler: Deno.ServeHandler) => {
      starts++;
      const server = denoServe(options, handler);
      const finished = Promise.reject(new Error("Too many open files"));
      return { addr: server.addr, finished, shutdown: () => server.shutdown() };
    };
    Deno.serve = serveAndFail as unknown as typeof Deno.serve;
    const server = startServer();
    await server.stop();
    await sleep(300); // a restart would take 50 ms
    assert.equal(starts, 1);
  }, !onDeno && "Bun does not stop listening");
});

// ---- The page -----------------------------------------------------------------------------------
// What concerns the page alone is tested with a server in this process; what depends on what a server
// does, with a server on each runtime.

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

const howToGetChromium = "apt-get install chromium, or set CHROMIUM to the path of a Chromium";
const pageSkipped = bun
  ? without("Chromium", existsSync(chromium), howToGetChromium)
  : "needs Bun's WebView";

type DefineTest = (name: string, run: () => Promise<void>) => void;

/** Describes the page. If the tests are skipped, the title says why. */
function describePage(
  title: string,
  define: (pageTest: DefineTest) => void,
  skip: string | false = pageSkipped,
): void {
  describe(skip ? `${title} (skipped: ${skip})` : title, () => {
    define((name, run) => it(name, { timeout: 60_000, skip }, run));
  });
}

const silence: Subprotocol = () => () => {};

/** Subprotocols that never reply. */
const mute = { [NAME]: silence, chat: silence };

type Runtime = "Deno" | "Bun";
const runtimeCommands: Record<Runtime, string[]> = {
  Deno: ["deno", ...denoArgs],
  Bun: [process.execPath],
};

/** Starts server.ts, or another program, on a runtime. */
function startOn(runtime: Runtime, args: string[] = [], file = join(here, "server.ts")): Program {
  const [command, ...commandArgs] = runtimeCommands[runtime];
  return new Program(command, [...commandArgs, file, "--port", "0", ...args]);
}

/** Writes a program that serves only these subprotocols, given as code, and gives its path. */
function programWith(entries: string): string {
  const file = join(temporaryFolder(), "program.ts");
  const serverUrl = new URL("server.ts", import.meta.url).href;
  writeFileSync(
    file,
    `import { serve } from "${serverUrl}";
    const { port } = serve({ port: 0, quiet: true, subprotocols: { ${entries} } });
    console.log("Listening on http://localhost:" + port + "/");`,
  );
  return file;
}

async function stop(program: Program): Promise<void> {
  program.signal("SIGTERM");
  await program.exitStatus();
}

/** A proxy that speaks TLS and hands on to another port what it is sent. */
async function listenOverTls(port: number): Promise<number> {
  const [, certFile, , keyFile] = certificate();
  const options = { cert: readFileSync(certFile), key: readFileSync(keyFile) };
  const proxy = createTlsServer(options, (client) => {
    const upstream = connectTcp(port, "127.0.0.1");
    client.pipe(upstream).pipe(client);
    for (const socket of [client, upstream]) socket.on("error", () => {});
    cleanups.push(() => (client.destroy(), upstream.destroy()));
  });
  cleanups.push(() => proxy.close());
  await new Promise<void>((resolve) => proxy.listen(0, "127.0.0.1", resolve));
  return (proxy.address() as { port: number }).port;
}

/** Opens a page in Chromium. */
async function browse(url: string): Promise<View> {
  const switches = ["no-sandbox", "disable-background-networking", "disable-component-update"];
  const argv = [...switches, "disable-sync", "ignore-certificate-errors"].map((s) => `--${s}`);
  const view = new bun!.WebView({ backend: { type: "chrome", url: false, path: chromium, argv } });
  cleanups.push(() => view.close());
  await view.navigate(url);
  await view.evaluate(nextFrame); // Chromium drops what is typed before the page is painted
  return view;
}

const nextFrame = "new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)))";

/** Opens the page of a new server, and waits until it is connected. */
async function browseConnected(query = "", options: Options = {}): Promise<View> {
  return await browsePort(listen(options), query);
}

/** The same for a server that is there already. */
async function browsePort(port: number, query = ""): Promise<View> {
  const view = await browse(`http://localhost:${port}/${query}`);
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

/** What the page gives to console.log from now on. */
const recordConsole = `globalThis.printed = [], console.log = (...parts) => printed.push(...parts)`;
/** How many of what was printed are such messages. */
const printedTimes = (pattern: RegExp) => `printed.filter((part) => ${pattern}.test(part)).length`;

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

const runTimes = (view: View, text: string, number: number) =>
  view.evaluate(`times.open = true, message.value = ${JSON.stringify(text)},
    document.getElementById("number").value = ${number}, run.click()`);

const pageFile = new URL("index.html", import.meta.url).href;

describePage("the page", (pageTest) => {
  // ---- The log

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

  pageTest("is amber while a server named by ?server= is silent", async () => {
    const address = `ws://127.0.0.1:${await listenSilently()}/any/path`;
    const view = await browse(`http://localhost:${listen()}/?server=${address}`);
    await shows(view, state("connecting"), amber, status(`Connecting to ${address}`));
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

  pageTest("uses ws://localhost:9000/ where it was opened as a file", async () => {
    const view = await browse(pageFile);
    await shows(view, `address.value === "ws://localhost:9000/"`, status("ws://localhost:9000/"));
  });

  // ---- Closing

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

  pageTest("says when a reply is due for 5 s, and stays green", async () => {
    const view = await browseConnected("", { subprotocols: mute });
    const chatView = await browseConnected("?protocol=chat", { subprotocols: mute });
    await enter(chatView, "Hello"); // here no reply belongs to a message
    await enter(view, "Hello");
    await shows(view, row(/→.*Hello/), notice(""));
    await shows(view, notice("No reply for 5 s"), green);
    await shows(chatView, row(/→.*Hello/), notice(""));
  });

  // ---- The header and the message field do not move

  pageTest("moves nothing in 30 s without a server, 320, 390 and 900 pixels wide", async () => {
    const server = startServer();
    const views = await Promise.all([320, 390, 900].map(async (width) => {
      const view = await browsePort(server.port);
      await view.resize(width, 700);
      await shows(view, `innerWidth === ${width}`);
      await submit(view, `"Hello"`);
      await shows(view, row(/←/));
      return view;
    }));
    await sleep(500); // what has begun to move comes to rest
    const tops = await Promise.all(views.map((view) => view.evaluate(fieldTop)));
    for (const view of views) await view.evaluate(observe);
    await server.stop();
    await sleep(30_000);
    for (const [index, view] of views.entries()) {
      await shows(view, red, "layoutShift < 0.1", `${fieldTop} === ${tops[index]}`);
      await shows(view, "statusChanges >= 1", "statusChanges <= 3");
    }
  });

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

  pageTest("sends once while Enter is held down", async () => {
    const view = await browseConnected();
    await view.evaluate(`(() => {
      message.value = "Hello";
      const options = { key: "Enter", bubbles: true, cancelable: true };
      for (const repeat of [false, true, true]) {
        message.dispatchEvent(new KeyboardEvent("keydown", { ...options, repeat }));
      }
    })()`);
    await shows(view, row(/←.*olleH/), `${rows(/→/)} === 1`);
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

  pageTest("moves the caret with the arrow keys inside a message of two lines", async () => {
    const view = await browseConnected();
    await enter(view, "first");
    await submit(view, `"one\\ntwo"`);
    await view.press("ArrowUp");
    await shows(view, "message.value === 'one\\ntwo'");
    await view.press("ArrowUp");
    await shows(view, "message.value === 'one\\ntwo'", "message.selectionStart <= 3");
    await view.press("ArrowUp");
    await shows(view, "message.value === 'first'");
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

  pageTest("refuses a message while 64 MiB are waiting, and keeps it in the field", async () => {
    const view = await browse(`http://localhost:${listen()}/?server=ws://127.0.0.1:1/`);
    await submit(view, `"x".repeat(64 * 1024 * 1024 + 1)`);
    await shows(view, notice("1 message waiting"));
    await submit(view, `"one more"`);
    await shows(view, includes("error", "Too much is waiting"), "message.value === 'one more'");
    await shows(view, notice("1 message waiting"));
  });

  pageTest("writes whole texts of both directions to the console", async () => {
    const view = await browseConnected();
    await view.evaluate(recordConsole);
    await submit(view, `"begin" + "-".repeat(5000) + "end"`);
    await shows(view, `printed.includes("begin" + "-".repeat(5000) + "end")`);
    await shows(view, `printed.includes("dne" + "-".repeat(5000) + "nigeb")`);
    await shows(view, "printed.indexOf('→') < printed.findIndex((part) => /←/.test(part))");
  });

  pageTest("writes to the console of a hidden page, which has no animation frames", async () => {
    const view = await browseConnected();
    await view.evaluate(recordConsole);
    await view.evaluate("globalThis.requestAnimationFrame = () => 0");
    await enter(view, "Hello");
    await shows(view, "printed.includes('Hello')", "printed.includes('olleH')");
  });

  // ---- On the wire

  pageTest("links to MDN and RFC 6455", async () => {
    const view = await browseConnected();
    for (const host of ["developer.mozilla.org", "www.rfc-editor.org"]) {
      await shows(view, `wire.querySelector('a[href*="//${host}/"][rel=noreferrer]') !== null`);
    }
  });

  // ---- Times N

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

  // ---- The document

  pageTest("has a language, a heading and a label for each field", async () => {
    const view = await browseConnected();
    await shows(view, "document.documentElement.lang === 'en'");
    await shows(view, "document.querySelector('h1').textContent === 'WebSocket test'");
    const fields = "[...document.querySelectorAll('input, textarea')]";
    await shows(view, `${fields}.every((field) => field.labels.length === 1)`);
  });

  for (const width of [320, 390, 900, 1600]) {
    for (const scheme of ["light", "dark"]) {
      pageTest(`fits a window of ${width} pixels, in ${scheme} with enough contrast`, async () => {
        const view = await browseConnected("?protocol=on-demand");
        const features = [{ name: "prefers-color-scheme", value: scheme }];
        await view.cdp("Emulation.setEmulatedMedia", { features });
        await view.resize(width, 700);
        const isSet = `matchMedia("(prefers-color-scheme: ${scheme})").matches`;
        await shows(view, isSet, `innerWidth === ${width}`);
        await view.evaluate("connection.open = wire.open = times.open = true");
        await submit(view, `"a\\tb"`);
        await submit(view, `"x".repeat(1000)`);
        await submit(view, `"close 4001 bye"`);
        await shows(view, row(/←/), row(/Connection lost/), row(/Connected again/));
        await use(view, "connect", { protocol: "echo" });
        await shows(view, state("connected"), status("echo"));
        await runTimes(view, "Hello", 10);
        await shows(view, row(/Times 10/));
        await view.evaluate("hex.checked = true");
        await submit(view, `"xy"`);
        const texts = "[...log.querySelectorAll('bdi')]";
        await shows(view, `${texts}.every((text) => text.scrollWidth <= text.clientWidth)`);
        await shows(view, `document.documentElement.scrollWidth <= ${width}`);
        assert.deepEqual(await view.evaluate(lowContrasts), []);
      });
    }
  }
});

for (const runtime of ["Deno", "Bun"] as const) {
  const hasRuntime = runtime === "Bun" || !bun || spawnSync("deno", ["--version"]).status === 0;
  const skipped = pageSkipped || without(runtime, hasRuntime);
  describePage(`the page, with a server on ${runtime}`, (pageTest) => {
    const start = (...args: string[]) => startOn(runtime, args);
    const startAgain = (port: number) => start("--port", `${port}`).port();
    const browseNew = async (query = "", ...args: string[]) =>
      await browsePort(await start(...args).port(), query);

    // ---- The log

    pageTest("shows a message and its reply in one row each", async () => {
      const view = await browseNew();
      await enter(view, "Hello, world!");
      await shows(view, row(/→.*Hello, world!.*13 bytes.*\d\d:\d\d:\d\d/));
      await shows(view, row(/←.*!dlrow ,olleH.*13 bytes.*\d\d:\d\d:\d\d.*\d ms/));
      await shows(view, `${rows(/[→←]/)} === 2`);
    });

    pageTest("shows a round trip on the reply's row only", async () => {
      const view = await browseNew("?protocol=echo");
      await enter(view, "Hello");
      await shows(view, row(/←.*Hello.* ms/), `${rows(/→.* ms/)} === 0`);
    });

    pageTest("shows a pushed message as received, with no round trip", async () => {
      const view = await browseNew("?protocol=count");
      await enter(view, "reset");
      await shows(view, row(/→.*reset/), row(/←.* 1 .*1 byte /), row(/←.* 2 /));
      await shows(view, `${rows(/ ms/)} === 0`, "log.querySelector('.wrong') === null");
    });

    pageTest("shows each message once to both members of a chat", async () => {
      const port = await start().port();
      const sender = await browsePort(port, "?protocol=chat");
      const other = await browsePort(port, "?protocol=chat");
      await enter(sender, "hello all");
      await shows(sender, `${rows(/→.*hello all/)} === 1`, `${rows(/←.*hello all/)} === 1`);
      await shows(other, `${rows(/→/)} === 0`, `${rows(/←.*hello all/)} === 1`);
      await shows(sender, `${rows(/ ms/)} === 0`);
    });

    pageTest("tells a racecar's reply, and an empty message's, from what was sent", async () => {
      const view = await browseNew();
      await enter(view, "racecar");
      await shows(view, row(/→.*racecar/), row(/←.*racecar/));
      await view.press("Enter");
      await shows(view, row(/→.*0 bytes/), row(/←.*0 bytes/), logged("(empty)"));
    });

    pageTest("shows a lone surrogate as what is sent for it, U+FFFD", async () => {
      const view = await browseNew("?protocol=echo");
      await submit(view, `"a\\ud800b"`);
      await shows(view, row(/→.*a\ufffdb.*5 bytes/), row(/←.*a\ufffdb.*5 bytes/));
    });

    // ---- Connecting

    pageTest("is green and says where it is connected", async () => {
      const port = await start().port();
      const view = await browse(`http://localhost:${port}/`);
      await shows(view, state("connected"), green, status(`ws://localhost:${port}/`), status(NAME));
      await shows(view, row(/Connected to ws:/), "document.activeElement === message");
    });

    pageTest("connects to the server of ?server= with the subprotocol of ?protocol=", async () => {
      const address = `ws://127.0.0.1:${await start().port()}/any/path`;
      const view = await browse(`http://localhost:${listen()}/?server=${address}&protocol=echo`);
      await shows(view, state("connected"), status("/any/path"), status("echo"));
      await shows(view, `address.value === "${address}"`, "protocol.value === 'echo'");
    });

    pageTest("talks to a plain echo, which selects no subprotocol", async () => {
      const view = await browseNew("?protocol=", "--default", "echo");
      await enter(view, "Hello");
      await shows(view, row(/→.*Hello/), row(/←.*Hello/), `${rows(/ ms/)} === 0`);
      await shows(view, status("no subprotocol"));
    });

    pageTest("stays red and explains when a server refuses the subprotocol", async () => {
      const view = await browse(`http://localhost:${await start().port()}/?protocol=unknown`);
      await shows(view, state("failed"), red, row(/No connection.*does not tell a page.*1006/));
      await shows(view, "log.querySelector('.wrong') !== null");
    });

    pageTest("connects to another server and subprotocol with Connect", async () => {
      const other = await start().port();
      const view = await browseConnected();
      await use(view, "connect", { address: `ws://localhost:${other}/`, protocol: "echo" });
      await shows(view, state("connected"), status(`ws://localhost:${other}/`), status("echo"));
      await enter(view, "Hello");
      await shows(view, row(/←.*Hello/), `${rows(/closed the connection/)} === 1`);
      await shows(view, state("connected"), green);
    });

    pageTest("uses wss where it came by https", async () => {
      const port = await start(...certificate()).port();
      const view = await browse(`https://localhost:${port}/`);
      await shows(view, state("connected"), status(`wss://localhost:${port}/`));
      await enter(view, "Hello");
      await shows(view, row(/←.*olleH/));
    });

    pageTest("finds its server behind a proxy, under any path, with and without TLS", async () => {
      const proxy = await listenUnderPath("/under/a/path/", await start().port());
      const tlsProxy = await listenOverTls(proxy);
      for (const [s, port] of [["", proxy], ["s", tlsProxy]]) {
        const view = await browse(`http${s}://localhost:${port}/under/a/path/`);
        await shows(view, state("connected"), status(`ws${s}://localhost:${port}/under/a/path/`));
        await enter(view, "Hello");
        await shows(view, row(/←.*olleH/));
      }
    });

    pageTest("opened as a file, it talks to a server and connects again", async () => {
      const server = start();
      const port = await server.port();
      const view = await browse(`${pageFile}?server=ws://localhost:${port}/`);
      await enter(view, "Hello");
      await shows(view, green, row(/←.*olleH.* ms/));
      await stop(server);
      await shows(view, red, row(/Connection lost/));
      await startAgain(port);
      await shows(view, green, row(/Connected again/));
    });

    // ---- Closing

    pageTest("closes with a code and a reason, and stays closed", async () => {
      const view = await browseNew();
      await use(view, "close", { code: "4001", reason: "bye" });
      await shows(view, state("closed"), `!(${red})`, row(/This page closed.*4001, “bye”\. \d/));
      await sleep(600); // the first new try would come after 250 ms
      await shows(view, state("closed"), "log.querySelector('.wrong') === null");
      await use(view, "connect", {});
      await shows(view, state("connected"), green);
    });

    pageTest("ends the tries with Close while there is no server", async () => {
      const server = start();
      const port = await server.port();
      const view = await browsePort(port);
      await stop(server);
      await shows(view, state("lost"), red);
      await use(view, "close", {});
      await shows(view, state("closed"), row(/stopped trying/));
      await startAgain(port);
      await sleep(1000); // the next try would come after 0.5 s, or 1 s at most
      await shows(view, state("closed"));
    });

    pageTest("takes a server's clean 1000 for no failure, and does not connect again", async () => {
      const view = await browseNew("?protocol=on-demand");
      await enter(view, "close 1000 bye");
      await shows(view, state("closed"), `!(${red})`, row(/The server closed.*1000.*bye/));
      await sleep(600);
      await shows(view, state("closed"), "log.querySelector('.wrong') === null");
    });

    pageTest("shows another code as an abnormal end, and connects again", async () => {
      const view = await browseNew("?protocol=on-demand");
      await enter(view, "close 4001 bye");
      await shows(view, row(/Connection lost.*4001.*bye/), row(/Connected again/), green);
      await shows(view, "log.querySelectorAll('.wrong').length === 1");
    });

    pageTest("explains a message too big, and connects again without it", async () => {
      const view = await browseNew();
      await submit(view, `"x".repeat(1024 * 1024 + 1)`);
      await shows(view, row(/Connection lost.*(1009|1006).*Messages without a reply: 1/));
      await shows(view, row(/Connected again/), state("connected"));
    });

    pageTest("connects again with growing pauses to a server that closes each time", async () => {
      const file = programWith(`"${NAME}": (connection) => connection.close(1011, "not now")`);
      const address = `ws://localhost:${await startOn(runtime, [], file).port()}/`;
      const view = await browse(`http://localhost:${listen()}/?server=${address}`);
      await shows(view, `${rows(/Connection lost.*1011.*not now/)} >= 3`);
      await sleep(1500); // pauses of 250 ms would lead to 6 more
      await shows(view, `${rows(/Connection lost/)} <= 5`);
    });

    pageTest("says that the server is lost, keeps what is typed, and sends it later", async () => {
      const server = start();
      const port = await server.port();
      const view = await browsePort(port);
      await stop(server);
      await shows(view, state("lost"), red, row(/Connection lost.*code 10/));
      await enter(view, "meanwhile");
      await enter(view, "and again");
      await shows(view, notice("2 messages waiting"), `${rows(/→/)} === 0`);
      await startAgain(port);
      await shows(view, state("connected"), green, row(/Connected again/), notice(""));
      await shows(view, row(/→.*meanwhile/), row(/←.*elihwnaem/), row(/←.*niaga dna/));
    });

    // ---- On the wire

    pageTest("shows the last frame of each direction as it travels", async () => {
      const view = await browseNew();
      await enter(view, "Hello, world!");
      await shows(view, includes("sentFrame", "81 8d mm mm mm mm …"));
      await shows(view, includes("sentFrame", "The header costs 6 bytes: 19 bytes travel"));
      await shows(view, includes("receivedFrame", "81 0d 21 64 6c 72 6f 77 20 2c 6f 6c 6c 65 48"));
      await shows(view, includes("receivedFrame", "The header costs 2 bytes: 15 bytes travel"));
      const unknown = [includes("wire", "cannot know the mask key"), includes("wire", "fragments")];
      await shows(view, ...unknown);
    });

    pageTest("shows how the header grows with the length of a message", async () => {
      const view = await browseNew("?protocol=echo");
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
      const view = await browseNew("?protocol=on-demand");
      await enter(view, "bytes 3");
      await shows(view, includes("receivedFrame", "82 03 00 00 00"), row(/←.*00 00 00.*3 bytes/));
    });

    // ---- Times N

    pageTest("sends a message N times and shows the round trips in one row", async () => {
      const view = await browseNew();
      await runTimes(view, "Hello", 500);
      const figure = "[\\d.,]+ ms";
      const titles = ["total", "median", "99th percentile", "longest"];
      const figures = titles.map((title) => `${title} ${figure}`).join(", ");
      await shows(view, row(new RegExp(`Times 500, 5 bytes: ${figures}`)));
      await shows(view, "log.querySelectorAll('svg path').length === 1", `${rows(/[→←]/)} === 0`);
      await shows(view, "log.children.length === 2", "run.textContent === 'Send N times'");
    });

    pageTest("computes the figures of Times N from the round trips in the console", async () => {
      const view = await browseNew();
      await view.evaluate(recordConsole);
      await runTimes(view, "Hello", 150);
      await shows(view, row(/Times 150/), "printed.some(Array.isArray)");
      const roundTrips = await view.evaluate("printed.find(Array.isArray)") as number[];
      const sorted = roundTrips.toSorted((a, b) => a - b).map((time) => `${time.toFixed(1)} ms`);
      assert.equal(sorted.length, 150);
      const [median, nearlyLongest, longest] = [sorted[74], sorted[148], sorted[149]];
      const figures = `median ${median}, 99th percentile ${nearlyLongest}, longest ${longest}`;
      await shows(view, logged(figures));
      const total = await view.evaluate("log.textContent.match(/total ([\\d.]+) ms/)[1]");
      const sum = roundTrips.reduce((sum, time) => sum + time);
      assert.ok(sum <= Number(total) + 0.1, `${sum} ms of round trips in ${total} ms`);
    });

    pageTest("can stop Times N, and goes on as before", async () => {
      const view = await browseNew("?protocol=echo");
      await runTimes(view, "Hello", 100_000);
      await shows(view, "run.textContent === 'Stop'", "progress.value > 100");
      await view.click("#run");
      await shows(view, row(/Times 100,000, stopped after [\d,]+, 5 bytes: total/));
      await submit(view, `"afterwards"`);
      await shows(view, row(/←.*afterwards.* ms/), `${rows(/[→←]/)} === 2`);
    });

    pageTest("ends Times N with its row when the connection ends", async () => {
      const server = start();
      const view = await browsePort(await server.port());
      await runTimes(view, "Hello", 100_000);
      await shows(view, "progress.value > 100");
      await stop(server);
      await shows(view, row(/stopped after/), row(/Connection lost/), "run.matches(':disabled')");
    });

    pageTest("offers Times N only where a reply belongs to a message", async () => {
      const view = await browseNew();
      const address = await view.evaluate("address.value") as string;
      for (const name of [NAME, "echo", "count", "chat", "on-demand"]) {
        await use(view, "connect", { address, protocol: name });
        await shows(view, state("connected"), status(name));
        const isOffered = [NAME, "echo"].includes(name);
        await shows(view, `run.matches(":disabled") === ${!isOffered}`);
      }
    });

    // ---- Floods

    pageTest("survives 10,000 messages, gets all replies and goes on", async () => {
      const view = await browseNew();
      await view.evaluate(recordConsole);
      await view.evaluate(`(() => {
        for (let i = 0; i < 10_000; i++) {
          message.value = "number " + i;
          form.requestSubmit();
        }
      })()`);
      await shows(view, `${printedTimes(/^number \d+$/)} === 10_000`);
      await shows(view, `${printedTimes(/^\d+ rebmun$/)} === 10_000`);
      await shows(view, logged("9999 rebmun"), "log.children.length === 200", green);
      await enter(view, "afterwards");
      await shows(view, row(/←.*sdrawretfa/), green);
    });

    pageTest("survives 50,000 pushed messages, and goes on", async () => {
      const view = await browseNew("?protocol=on-demand");
      await view.evaluate(recordConsole);
      for (let pushed = 10_000; pushed <= 50_000; pushed += 10_000) {
        await submit(view, `"repeat 10000 hello"`);
        await shows(view, `${printedTimes(/^hello$/)} === ${pushed}`);
      }
      await shows(view, "log.children.length === 200", green);
      await enter(view, "delay 1 afterwards");
      await shows(view, row(/←.*afterwards/), green);
    });

    // ---- The document

    pageTest("keeps to its policy, with one style and one script", async () => {
      for (const [pattern, number] of [[/<style/g, 1], [/<script/g, 1], [/ style=| on\w+=/g, 0]]) {
        assert.equal([...page.matchAll(pattern as RegExp)].length, number, String(pattern));
      }
      const port = await start().port();
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
  }, skipped);
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

/** Makes a copy of the project with the files of the README and, if so wished, its subprotocols. */
function projectOfReader(port: number, hasSubprotocols = true): string {
  const folder = temporaryFolder();
  const files = ["README.md", "deno.json", "index.html", "server.ts", "server_test.ts", ".ci"];
  for (const file of files) cpSync(join(here, file), join(folder, file), { recursive: true });
  for (const block of readmeBlocks) {
    const name = fileName(block);
    if (name) writeFileSync(join(folder, name), block.code.replaceAll("9001", String(port)));
    if (hasSubprotocols && isTest(block)) addTest(folder, block.code);
    if (hasSubprotocols && isSubprotocol(block)) addToTable(folder, block.code);
  }
  return folder;
}

function addTest(folder: string, code: string): void {
  const file = join(folder, "server_test.ts");
  const isThereAlready = readFileSync(file, "utf8").includes(code);
  if (!isThereAlready) appendFileSync(file, `\n${code}`);
}

function addToTable(folder: string, code: string): void {
  const file = join(folder, "server.ts");
  const source = readFileSync(file, "utf8");
  const entry = code.replace(/^(?=.)/gm, "  ");
  if (source.includes(entry)) return;
  const table = "export const subprotocols: Record<string, Subprotocol> = {\n";
  assert.ok(source.includes(table), "server.ts has a table of subprotocols");
  writeFileSync(file, source.replace(table, () => table + entry));
}

/** A command in a terminal, where Ctrl+C reaches all processes of the command. */
class Terminal {
  stdout = "";
  stderr = "";
  readonly #child: ChildProcess;
  readonly #end: Promise<number | null>;

  constructor(readonly command: string, readonly folder: string, readonly port = 0) {
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

  /** Waits until it has printed a match; returns undefined if it ends instead. */
  find(pattern: RegExp): Promise<string | undefined> {
    return until(this.#child.stdout!, () => this.stdout.match(pattern)?.[0]);
  }

  /** Waits until it says where it listens; returns undefined if it ends instead. */
  url(): Promise<string | undefined> {
    return this.find(/\w+:\/\/localhost:\d+\/$/m);
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

/** Starts a server with the subprotocols of the README, without those that were added since. */
function listenAsInReadme(): number {
  const entries = Object.entries(subprotocols);
  const inReadme = entries.filter(([name]) => readme.includes(`\n| \`${name}\``));
  return listen({ subprotocols: Object.fromEntries(inReadme) });
}

/** Runs the commands of a block one after the other. */
async function runCommands(block: Block): Promise<void> {
  const port = await freePort();
  const folder = projectOfReader(port, block.code.includes("server_test.ts"));
  if (block.code.includes("--cert ")) {
    const makeCertificate = readmeBlocks.find(({ code }) => code.startsWith("openssl "))!.code;
    await new Terminal(makeCertificate, folder, port).endsWell();
  }
  for (const command of ownCommands(block)) {
    const text = command.replaceAll("localhost:9000", `localhost:${listenAsInReadme()}`);
    const terminal = new Terminal(text, folder, port);
    if (await terminal.url()) {
      await tryServer(terminal, block);
      continue;
    }
    await terminal.endsWell();
    if (block.output) await terminal.prints(block.output);
    const runsOneTest = command.endsWith(" server_test.ts");
    if (runsOneTest) assert.match(terminal.stdout + terminal.stderr, /\b1 pass/);
  }
}

/** Talks to a server that a command has started, and stops it. */
async function tryServer(terminal: Terminal, { introduction, output }: Block): Promise<void> {
  const { command, folder, port } = terminal;
  const url = (await terminal.url())!;
  assert.equal(new URL(url).port, String(port), terminal.stderr);
  if (introduction.includes("as often as you have cores")) {
    const second = new Terminal(command, folder, port);
    assert.equal(await second.url(), url, second.stderr);
  }
  const showsMessages = output?.includes("Hello, world!");
  if (output && !showsMessages) await terminal.prints(output);
  const raw = await askHello(url, folder);
  if (output && showsMessages) await terminal.prints(output);
  raw.socket.destroy();
  await terminal.stopWithCtrlC();
}

/** Connects to a server that a command has started, and gets a message reversed. */
async function askHello(url: string, folder: string): Promise<RawClient> {
  const port = Number(new URL(url).port);
  const ca = () => readFileSync(join(folder, "cert.pem"));
  const raw = url.startsWith("https:")
    ? new RawClient(connectTls({ port, host: "127.0.0.1", servername: "localhost", ca: ca() }))
    : RawClient.to(port);
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
  const terminal = new Terminal(`${command} 2>&1`, folder);
  await terminal.prints(output!);
  await server.stop();
  await terminal.endsWell();
  await terminal.prints(output!);
}

/** Adds an entry to the table and sends it "hello". */
async function trySubprotocol({ code, output }: Block): Promise<void> {
  const folder = projectOfReader(0);
  const port = await startProgram(["--port", "0"], {}, join(folder, "server.ts")).port();
  const raw = await RawClient.open(port, code.match(/^"(\w+)"/)![1]);
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
  const terminal = new Terminal("/usr/bin/python3 program.py", folder);
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
  const nginx = new Terminal(`nginx -p ${folder} -c nginx.conf -e stderr`, folder);
  const getPage = () => request(port, "GET /echo/ HTTP/1.1\r\nHost: localhost\r\n\r\n");
  const response = await eventually(getPage, "nginx answers").catch(() =>
    assert.fail(nginx.stderr)
  );
  assert.equal(response.status, 200);
  const raw = RawClient.to(port);
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
  if (tools.includes("npx") && !isUnderNpx && !process.env.CI) {
    return "these tests were not started with npx";
  }
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

  const curl = readmeBlocks.find(({ code }) => code.startsWith("curl "))!;
  test("the curl command is refused for nothing but its subprotocol", async () => {
    const command = `${curl.code.trimEnd()} --verbose 2>&1`
      .replace("localhost:9000", `localhost:${listen()}`)
      .replace("unknown", NAME);
    const terminal = new Terminal(command, here);
    assert.ok(await terminal.find(/^< HTTP\/1.1 101 /m), terminal.stdout);
  }, reasonToSkip(curl));

  test("each command can be pasted into zsh: no comments, no unquoted patterns", () => {
    for (const { code, line } of readmeBlocks.filter(isShell)) {
      const unquoted = code.replace(/'[^']*'/g, "");
      assert.doesNotMatch(unquoted, /[#?*[\]~!^]|\s=/, `README.md, line ${line}`);
    }
  });
});

// ---- The benchmark ------------------------------------------------------------------------------
// `deno task bench` runs it; the tests do not. It compares `reverse` with the usual ways to reverse a
// text: the one by code points, which tears clusters apart, and the one by clusters.

if (typeof Deno !== "undefined") {
  const segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });
  const samples = {
    "ASCII": "The quick brown fox jumps over the lazy dog, 0123456789. ",
    "plain scripts": "Žluťoučký kůň úpěl ďábelské ódy. Быстрая лиса 日本語のテキスト 안녕하세요 ",
    "emoji and marks": "Žluťoučký kůň 👨‍👩‍👧 e\u0301 日本語 🇨🇿 ",
  };
  const sizes = { "16 B": 16, "1 KiB": 1024, "64 KiB": 64 * 1024, "1 MiB": 1024 * 1024 };
  for (const [kind, sample] of Object.entries(samples)) {
    for (const [sizeName, size] of Object.entries(sizes)) {
      const text = Buffer.from(sample.repeat(size / 16)).subarray(0, size).toString();
      const group = `${kind}, ${sizeName}`;
      Deno.bench("reverse", { group, baseline: true }, () => {
        reverse(text);
      });
      Deno.bench('[...s].reverse().join("")', { group }, () => {
        [...text].reverse().join("");
      });
      Deno.bench("Intl.Segmenter", { group }, () => {
        Array.from(segmenter.segment(text), (s) => s.segment).reverse().join("");
      });
    }
  }
}
