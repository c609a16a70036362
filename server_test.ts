/**
 * Tests of server.ts and index.html, for `deno test -A` and `bun test` alike. Each runtime tests the
 * server as it runs there, over real sockets on free ports.
 *
 * Helpers come first: servers, then clients. The groups of tests follow. They are named like the
 * sections of README.md, so that `--filter` (Deno) or `-t` (Bun) finds the tests of a section.
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
import { cpSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { connect as connectHttp2, type IncomingHttpHeaders } from "node:http2";
import { connect as connectTcp, createServer, type Socket } from "node:net";
import { networkInterfaces, tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import type { Readable } from "node:stream";
import { afterEach, describe, it } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { connect as connectTls } from "node:tls";
import {
  type Connection,
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

/** A test of several cases, which run side by side to save time. Fails with all that went wrong. */
function testCases<Case>(
  name: string,
  cases: Record<string, Case>,
  run: (value: Case, name: string) => Promise<void>,
  skip: string | false = false,
): void {
  test(name, async () => {
    const failures: string[] = [];
    const running = Object.entries(cases).map(async ([caseName, value]) => {
      try {
        await run(value, caseName);
      } catch (error) {
        failures.push(`${caseName}: ${(error as Error).stack}`);
      }
    });
    await Promise.all(running);
    if (failures.length > 0) assert.fail(failures.join("\n"));
  }, skip);
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

/** Starts a server in this process that the test can stop. It does not wait for its clients. */
function startServer(options: Options = {}): Server {
  const limits = { stopSeconds: 0, ...options.limits };
  const server = serve({ port: 0, hostname: "127.0.0.1", quiet: true, ...options, limits });
  cleanups.push(server.stop);
  return server;
}

/** Starts a server that speaks one more subprotocol, "added". */
function listenWith(added: Subprotocol, options: Options = {}): number {
  return listen({ ...options, subprotocols: { ...subprotocols, added } });
}

/** Starts a server that speaks one more subprotocol, and connects a client of it. */
function openAdded(added: Subprotocol): Promise<RawClient> {
  return RawClient.open(listenWith(added), "added");
}

/**
 * Starts a server whose subprotocol "added" answers each message with `count` messages of `size`
 * bytes. `closed` waits until a number of its connections are closed.
 */
function listenForFloods(count: number, size: number, limits: Options["limits"] = {}) {
  let closedCount = 0;
  const port = listenWith((connection) => {
    connection.onclose = () => void closedCount++;
    return () => {
      for (let i = 0; i < count; i++) connection.send(new Uint8Array(size));
    };
  }, { limits });
  const closed = (number = 1) =>
    eventually(() => assert.equal(closedCount, number), `${number} connections are closed`);
  return { port, closed };
}

/** Asks for a flood, reads nothing until it is closed, and returns the code and the reason. */
async function closeReasonUnread(
  { port, closed }: ReturnType<typeof listenForFloods>,
): Promise<string> {
  const client = await RawClient.open(port, "added");
  client.socket.pause();
  client.send("go");
  await closed();
  client.socket.resume();
  return client.closeReason();
}

/** Starts a server in a process of its own, so that it works while the client does. */
function listenSeparately(): Promise<number> {
  return startProgram(["--quiet"]).port();
}

/** Serves TCP connections on a free port, and returns the port. */
async function listenByTcp(serveClient: (client: Socket) => void): Promise<number> {
  const server = createServer(serveClient);
  cleanups.push(() => server.close());
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return (server.address() as { port: number }).port;
}

/** Accepts TCP connections and never responds. */
function listenSilently(): Promise<number> {
  return listenByTcp(() => {});
}

/** Starts a proxy that serves another port under a path, and returns its own port. */
function listenUnderPath(path: string, port: number): Promise<number> {
  return listenByTcp((client) => {
    const upstream = connectTcp(port, "127.0.0.1");
    const rewrite = (data: Buffer) => data.toString("latin1").replace(`GET ${path}`, "GET /");
    client.on("data", (data) => upstream.write(rewrite(data), "latin1"));
    upstream.pipe(client);
    for (const socket of [client, upstream]) {
      socket.on("error", () => {});
      cleanups.push(() => socket.destroy());
    }
  });
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

  /** Waits until the program has printed a match, at most for 10 s. */
  async prints(pattern: RegExp): Promise<RegExpMatchArray> {
    const matching = until(this.child.stdout!, () => this.out.match(pattern) ?? undefined);
    const match = await Promise.race([matching, sleep(10_000, undefined, { ref: false })]);
    return match ?? assert.fail(`${pattern} not in: ${this.out}${this.err}`);
  }

  /** Waits until the program has printed a match to stderr. */
  async reports(pattern: RegExp): Promise<void> {
    await eventually(() => assert.match(this.err, pattern), `it reports ${pattern}`);
  }

  /** Waits until the log says that a client's connection has closed. Returns the lines about it. */
  async logOf(address: string): Promise<string[]> {
    await this.prints(new RegExp(`^${address} closed with `, "m"));
    const lines = this.out.split("\n").filter((line) => line.startsWith(`${address} `));
    return lines.map((line) => line.slice(address.length + 1));
  }

  /** Sends a signal. With `child.kill`, Deno would not tell the exit status. */
  signal(name: NodeJS.Signals): void {
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

/** Starts server.ts, or another file, with arguments; on a free port, if they name none. */
function startProgram(
  args: string[] = [],
  env: Record<string, string> = { PORT: "0" },
  file = join(here, "server.ts"),
): Program {
  return new Program(process.execPath, [...runtimeArgs, file, ...args], env);
}

/** Starts a copy of server.ts with lines added to it, as somebody makes it their own. */
function startExtended(addedLines: string): Program {
  const source = readFileSync(join(here, "server.ts"), "utf8");
  const folder = copyServer({ "server.ts": `${source}\n${addedLines}` });
  return startProgram([], undefined, join(folder, "server.ts"));
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

const withoutOpenssl = without("openssl", spawnSync("openssl", ["version"]).status === 0);

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
  #chunks: Buffer[] = []; // received, but not yet taken
  #length = 0; // of the chunks together
  #neededLength = 0; // if more is needed to take a frame

  constructor(readonly socket: Socket) {
    cleanups.push(() => socket.destroy());
    socket.on("data", (chunk) => {
      this.#chunks.push(chunk);
      this.#length += chunk.length;
    });
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

  get #bytes(): Buffer {
    if (this.#chunks.length !== 1) this.#chunks = [Buffer.concat(this.#chunks)];
    return this.#chunks[0];
  }

  #skip(length: number): void {
    this.#chunks = [this.#bytes.subarray(length)];
    this.#length -= length;
    this.#neededLength = 0;
  }

  /** Waits for the next response; undefined at the end of the connection. */
  nextResponse(method = "GET"): Promise<HttpResponse | undefined> {
    return until(this.socket, () => this.#takeResponse(method));
  }

  #takeResponse(method: string): HttpResponse | undefined {
    const bytes = this.#bytes;
    const blankLine = bytes.indexOf("\r\n\r\n");
    if (blankLine < 0) return undefined;
    const bodyStart = blankLine + 4;
    const head = bytes.toString("latin1", 0, bodyStart);
    const header = (name: string) =>
      [...head.matchAll(new RegExp(`^${name}: *(.*)\r`, "gim"))].map(([, value]) => value);
    const bodyLength = method === "HEAD" ? 0 : Number(header("content-length")[0] ?? 0);
    const bodyEnd = bodyStart + bodyLength;
    if (bytes.length < bodyEnd) return undefined;
    const body = bytes.toString("utf8", bodyStart, bodyEnd);
    this.#skip(bodyEnd);
    return { status: Number(head.slice(9, 12)), body, header };
  }

  /** Waits for the next frame; undefined at the end of the connection. */
  nextFrame(): Promise<Frame | undefined> {
    return until(this.socket, () => this.#takeFrame());
  }

  #takeFrame(): Frame | undefined {
    if (this.#length < this.#neededLength) return undefined; // joining the chunks takes time
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
    this.#neededLength = end;
    if (bytes.length < end) return undefined;
    this.#skip(end);
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
  const longLength = Buffer.alloc(8);
  longLength.writeUInt32BE(data.length, 4);
  let length = [127, ...longLength];
  if (data.length < 65536) length = [126, ...longLength.subarray(6)];
  if (data.length < 126) length = [data.length];
  const head = Buffer.from([opcode | (fin ? 128 : 0), 128 | length[0], ...length.slice(1)]);
  return Buffer.concat([head, mask, data.map((byte, i) => byte ^ mask[i & 3])]);
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

// ---- The page: requests -------------------------------------------------------------------------

describe("The page: requests", () => {
  /** Sends a request without a body. */
  const get = (port: number, method: string, target: string, host = "localhost") =>
    request(port, `${method} ${target} HTTP/1.1\r\nHost: ${host}\r\n\r\n`);

  /** Returns the hash of the page's style or script, as a policy has it. */
  const contentHash = (element: string) => {
    const [, content] = page.match(`<${element}[^>]*>([^]*?)</${element}>`)!;
    return createHash("sha256").update(content).digest("base64");
  };

  const targets = ["/", "/echo/", "/a/b/", "//", "/?server=wss://example.org", "/?status=503"];
  const pageRequests = [
    ...targets.map((target) => `GET ${target} HTTP/1.1\r\nHost: localhost`),
    "GET / HTTP/1.0", // which HAProxy's `option httpchk GET /` sends
    "GET / HTTP/1.0\r\nHost:",
    "GET / HTTP/1.1\r\nHost:",
  ];
  for (const head of pageRequests) {
    test(`${JSON.stringify(head)} returns the page`, async () => {
      const { status, header, body } = await request(listen(), `${head}\r\n\r\n`);
      assert.equal(status, 200);
      assert.equal(body, page);
      assert.deepEqual(header("content-type"), ["text/html; charset=utf-8"]);
      assert.deepEqual(header("x-content-type-options"), ["nosniff"]);
    });
  }

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
    const program = startProgram([], undefined, join(folder, "server.ts"));
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

  for (const path of ["/absent", "/echo", "/index.html", "/server.ts", "/%2e%2e/server.ts"]) {
    test(`GET ${path} is answered with 404 in plain text`, async () => {
      const { status, header } = await get(listen(), "GET", path);
      assert.equal(status, 404);
      assert.deepEqual(header("content-type"), ["text/plain; charset=utf-8"]);
      assert.deepEqual(header("x-content-type-options"), ["nosniff"]);
    });
  }

  test("methods other than GET and HEAD are answered with 405, which names these two", async () => {
    for (const method of ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"]) {
      const { status, header } = await get(listen(), method, "/");
      assert.equal(status, 405, method);
      assert.deepEqual(header("allow"), ["GET, HEAD"]);
    }
  });

  for (const host of ["a b", "localhost:99999", "[bad", "^", "a/b", "a@b", "a?b", "a#b", "a\\b"]) {
    test(`the Host header "${host}" is refused with 400`, async () => {
      const port = listen();
      assert.equal((await get(port, "GET", "/", host)).status, 400);
      assert.equal((await request(port, handshake({ Host: host }))).status, 400);
    });
  }
});

// ---- The handshake ------------------------------------------------------------------------------

describe("The handshake", () => {
  test("a valid handshake gets 101, the hash of its key, and no extension", async () => {
    const offer = { "Sec-WebSocket-Extensions": "permessage-deflate, x-unknown" };
    const { status, header } = await request(listen(), handshake(offer));
    assert.equal(status, 101);
    assert.deepEqual(header("sec-websocket-accept"), ["s3pPLMBiTxaQ9kYGzzhZRbK+xOo="]);
    assert.match(header("upgrade")[0], /^websocket$/i);
    assert.match(header("connection")[0], /^upgrade$/i);
    assert.deepEqual(header("sec-websocket-extensions"), []);
  });

  const to = (target: string) => handshake({}, `GET ${target} HTTP/1.1`);
  const accepted: Record<string, string> = {
    "an Upgrade header in another case": handshake({ Upgrade: "WebSocket" }),
    "an Upgrade header with other protocols": handshake({ Upgrade: "h2c, websocket" }),
    "a Connection header in another case": handshake({ Connection: "upgrade" }),
    "a Connection header with other tokens": handshake({ Connection: "keep-alive, Upgrade" }),
    "a Connection header in two lines": handshake({ Connection: ["keep-alive", "Upgrade"] }),
    "any Origin header, without --origin,": handshake({ Origin: "https://example.org" }),
    "the path of a proxy": to("/a/path/of/a/proxy"),
    "the path //": to("//"),
    "a query": to("/absent?query"),
    "status=399, which is no refusal,": to("/?status=399"),
    "status=600, which is no refusal,": to("/?status=600"),
    "status=5xx, which is no number,": to("/?status=5xx"),
    "status=0503, which has four digits,": to("/?status=0503"),
    "an empty status": to("/?status="),
  };
  for (const [what, text] of Object.entries(accepted)) {
    test(`a handshake with ${what} is accepted`, async () => {
      const { status } = await request(listen(), text);
      assert.equal(status, 101);
    });
  }

  // The runtimes refuse headers that are much longer. If the time grew with the square of the
  // length, as it did with a regular expression, this would take minutes.
  const [headerCount, blankCount] = onDeno ? [20, 55_000] : [250, 14_000];
  test(`lists of ${blankCount} blanks or tabs between two items do not hold up the server`, async () => {
    const port = await listenSeparately();
    const lists = { Connection: "Upgrade", Upgrade: "websocket", "Sec-WebSocket-Protocol": NAME };
    for (let i = 0; i < headerCount; i++) {
      for (const [name, item] of Object.entries(lists)) {
        const value = `a${" \t"[i % 2].repeat(blankCount)}b, ${item}`;
        const { status } = await request(port, handshake({ [name]: value }));
        assert.equal(status, 101, name);
      }
    }
  });

  const version = (value: string | string[]) => handshake({ "Sec-WebSocket-Version": value });
  const key = (value: string | string[]) => handshake({ "Sec-WebSocket-Key": value });
  const connection = (value: string | string[]) => handshake({ Connection: value });
  const sampleKey = "dGhlIHNhbXBsZSBub25jZQ==";
  const noOffer = { "Sec-WebSocket-Protocol": [] };
  const upgradeHint = /Upgrade: websocket .* HTTP\/1\.1/;
  const connectionHint = /Connection: Upgrade/;
  const hostHint = /Host header is missing/;
  const statusHint = /The URL asks for this status/;
  const refused: Record<string, [string, number, RegExp]> = {
    "no version": [version([]), 426, /Sec-WebSocket-Version must be 13/],
    "version 8": [version("8"), 426, /Sec-WebSocket-Version must be 13/],
    "version 013": [version("013"), 426, /Sec-WebSocket-Version must be 13/],
    "no key": [key([]), 400, /Sec-WebSocket-Key/],
    "an empty key": [key(""), 400, /Sec-WebSocket-Key/],
    "a short key": [key("c2hvcnQ="), 400, /Sec-WebSocket-Key/],
    "a key of 32 bytes": [key(`${"A".repeat(43)}=`), 400, /Sec-WebSocket-Key/],
    "a key not in base64": [key(`${"!".repeat(22)}==`), 400, /Sec-WebSocket-Key/],
    "two keys": [key([sampleKey, sampleKey]), 400, /Sec-WebSocket-Key/],
    "no Upgrade header": [handshake({ Upgrade: [] }), 400, upgradeHint],
    "another Upgrade header": [handshake({ Upgrade: "websockets" }), 400, upgradeHint],
    "a no-break space in Upgrade": [handshake({ Upgrade: "\xa0websocket" }), 400, upgradeHint],
    "neither Upgrade nor Host": [handshake({ Upgrade: [], Host: "" }), 400, upgradeHint],
    "no Connection header": [connection([]), 400, connectionHint],
    "another Connection header": [connection("upgraded"), 400, connectionHint],
    "a no-break space in Connection": [connection("\xa0Upgrade"), 400, connectionHint],
    "an empty Host header": [handshake({ Host: "" }), 400, hostHint],
    "HTTP/1.0 and no Host header": [handshake({ Host: [] }, "GET / HTTP/1.0"), 400, hostHint],
    "an unknown subprotocol and version 8": [
      handshake({ "Sec-WebSocket-Protocol": "unknown", "Sec-WebSocket-Version": "8" }),
      400,
      /^Sec-WebSocket-Protocol must offer one of/,
    ],
    "the method POST": [handshake({}, "POST / HTTP/1.1"), 405, /must use GET/],
    "status=400": [to("/?status=400"), 400, statusHint],
    "status=503": [to("/a/path?x&status=503"), 503, statusHint],
    "status=599": [to("/?status=599"), 599, statusHint],
    "status=429": [handshake(noOffer, "GET /?status=429 HTTP/1.1"), 429, statusHint],
  };
  for (const [what, [text, status, words]] of Object.entries(refused)) {
    test(`a handshake with ${what} is refused with ${status} and the reason`, async () => {
      const response = await request(listen(), text);
      assert.equal(response.status, status);
      assert.match(response.body, words);
      assert.ok(response.body.length < 200, response.body);
      assert.deepEqual(response.header("content-type"), ["text/plain; charset=utf-8"]);
    });
  }

  // Some of these are refused by the runtime itself, in its own words.
  const refusedByRuntime: Record<string, string> = {
    "HTTP/1.1 and no Host header": handshake({ Host: [] }),
    "a body of 3 bytes": handshake({ "Content-Length": "3" }),
    "a body in chunks": handshake({ "Transfer-Encoding": "chunked" }),
  };
  for (const [what, text] of Object.entries(refusedByRuntime)) {
    test(`a handshake with ${what} is refused with 400`, async () => {
      const { status } = await request(listen(), text);
      assert.equal(status, 400);
    });
  }

  test("a refusal says what is allowed, and leaves its TCP connection to others", async () => {
    const client = RawClient.to(listen());
    client.socket.write(version("8"));
    const ofVersion = await client.nextResponse();
    assert.equal(ofVersion?.status, 426);
    assert.deepEqual(ofVersion.header("sec-websocket-version"), ["13"]);
    assert.deepEqual(ofVersion.header("upgrade"), ["websocket"]);
    client.socket.write(handshake({}, "HEAD / HTTP/1.1"));
    const ofMethod = await client.nextResponse("HEAD");
    assert.equal(ofMethod?.status, 405);
    assert.deepEqual(ofMethod.header("allow"), ["GET"]);
    client.socket.write("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert.equal((await client.nextResponse())?.status, 200);
  });

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

  const emptyOffers = [[], "", "  ", "\t"];
  const inherited = ["__proto__", "constructor", "toString", "hasOwnProperty"];
  const similar = [NAME.toUpperCase(), `${NAME}s`, `"${NAME}"`, `${NAME}\xa0`, `x,\xa0${NAME}`];
  const unknownOffers = [",", "other", ...similar, ...inherited];
  for (const offer of [...emptyOffers, ...unknownOffers]) {
    const shown = JSON.stringify(offer).replaceAll("\xa0", "\\u00a0");
    const what = Array.isArray(offer) ? "no offer" : `the offer ${shown}`;
    test(`${what} is refused with 400, which lists the subprotocols and names --default`, async () => {
      const text = handshake({ "Sec-WebSocket-Protocol": offer });
      const { status, header, body } = await request(listenWith(shout), text);
      assert.equal(status, 400);
      const names = [...Object.keys(subprotocols), "added"].join(", ");
      assert.ok(body.includes(names), body);
      assert.match(body, /--default NAME/);
      assert.deepEqual(header("content-type"), ["text/plain; charset=utf-8"]);
    });
  }

  test("only a client with no offer or an empty one gets the default, unnamed", async () => {
    const port = listen({ defaultSubprotocol: "echo" });
    for (const offer of emptyOffers) {
      const client = RawClient.to(port);
      client.socket.write(handshake({ "Sec-WebSocket-Protocol": offer }));
      const response = await client.nextResponse();
      assert.equal(response?.status, 101, JSON.stringify(offer));
      assert.deepEqual(response.header("sec-websocket-protocol"), []);
      assert.equal(await client.ask("same"), "same");
    }
    for (const offer of unknownOffers) {
      const { status } = await request(port, handshake({ "Sec-WebSocket-Protocol": offer }));
      assert.equal(status, 400, offer);
    }
  });
});

// ---- The subprotocols ---------------------------------------------------------------------------

describe("The subprotocols", () => {
  test("each client of a port is served by the subprotocol that it has named", async () => {
    const port = listen();
    const reversing = await RawClient.open(port);
    const echoing = await RawClient.open(port, "echo");
    const commanding = await RawClient.open(port, "on-demand");
    assert.equal(await reversing.ask("bytes 1"), "1 setyb");
    assert.equal(await commanding.ask("bytes 1"), "00");
    assert.equal(await echoing.ask("bytes 1"), "bytes 1");
    assert.equal(await echoing.ask("noe\u0308l"), "noe\u0308l");
    assert.equal(await echoing.ask(Uint8Array.of(1, 2, 255)), "0102ff");
    assert.equal(await echoing.ask(""), "");
  });

  test("count counts for each connection on its own, and again from 1 after reset", async () => {
    const port = listen();
    const first = await RawClient.open(port, "count");
    const resetting = await RawClient.open(port, "count");
    assert.equal(await first.nextText(), "1");
    assert.equal(await resetting.nextText(), "1");
    resetting.send("reset");
    const second = await RawClient.open(port, "count");
    assert.equal(await first.nextText(), "2");
    assert.equal(await second.nextText(), "1");
    const next = await resetting.nextText();
    assert.equal(next === "2" ? await resetting.nextText() : next, "1"); // a 2 may have been sent
  });

  test("clients of count and on-demand that are cut off leave no timer behind", async () => {
    // Remembers which long timers run; "timers" tells their number.
    const program = startExtended(`{
      const timers = new Set();
      for (const kind of ["Interval", "Timeout"]) {
        const set = globalThis["set" + kind];
        const clear = globalThis["clear" + kind];
        globalThis["set" + kind] = (callback, delay) => {
          const timer = set(callback, delay);
          if (delay >= 1000) timers.add(timer);
          return timer;
        };
        globalThis["clear" + kind] = (timer) => {
          timers.delete(timer);
          clear(timer);
        };
      }
      subprotocols["timers"] = () => () => String(timers.size);
    }`);
    const port = await program.port();
    const counter = await RawClient.open(port, "timers");
    const assertTimers = async (count: number) => assert.equal(await counter.ask(""), `${count}`);
    const open = (name: string) =>
      Promise.all(Array(50).fill(0).map(() => RawClient.open(port, name)));
    const [counting, delaying] = await Promise.all([open("count"), open("on-demand")]);
    for (const client of delaying) client.send(...Array(8).fill("delay 60000 x"));
    await eventually(() => assertTimers(50 + 50 * 8), "each timer runs");
    for (const { socket } of [...counting, ...delaying]) socket.resetAndDestroy();
    await eventually(() => assertTimers(0), "no timer runs");
  });

  test("chat sends each message to all members, also after one is cut off", async () => {
    const port = listen();
    const members = await Promise.all([1, 2, 3].map(() => RawClient.open(port, "chat")));
    members[1].send("hello all");
    for (const member of members) assert.equal(await member.nextText(), "hello all");
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
    for (let i = 0; i < 120; i++) {
      const copy = await reading.ask(text);
      assert.equal(copy?.length, text.length);
    }
    silent.socket.resume();
    assert.match(await silent.closeReason(), /^1008 too many unread/);
  });

  test("on-demand does what a message asks for", async () => {
    const client = await RawClient.open(listen(), "on-demand");
    assert.equal(await client.ask("delay 10 hello  you"), "hello  you");
    assert.equal(await client.ask("repeat 1 hello"), "hello");
    assert.equal(await client.ask("bytes 3"), "000000");
    assert.equal(await client.ask("bytes 0"), "");
    client.send("repeat 1000 again", "bytes 1");
    for (let i = 0; i < 1000; i++) assert.equal(await client.nextText(), "again");
    assert.equal((await client.nextFrame())?.opcode, BINARY);
  });

  test("on-demand explains what it knows, and what it cannot do, in one line", async () => {
    const tooManyDelays = /^delay: at most 60000 milliseconds, 1000 characters, 8 at a time$/;
    const closeCodes = /1000 to 1003, 1007 to 1014 or 3000 to 4999/;
    const commandHints: [string | Uint8Array, RegExp][] = [
      ["help", /close CODE REASON.*headers, help$/],
      ["what?", /close CODE REASON.*headers, help$/],
      ["constructor", /close CODE REASON.*headers, help$/],
      [Buffer.from("bytes 3"), /close CODE REASON.*headers, help$/],
      ["delay 60001 x", tooManyDelays],
      ["delay x y", tooManyDelays],
      ["delay 0000000000000000005 x", tooManyDelays],
      [`delay 1 ${"x".repeat(1001)}`, tooManyDelays],
      ["repeat 99999999 x", /at most \d+ times/],
      ["repeat 1.5 x", /at most \d+ times/],
      ["bytes 1048577", /at most 1048576/],
      ["bytes -1", /at most 1048576/],
      ["bytes 99999999999999999999", /at most 1048576/],
      ["close 1005 x", closeCodes],
      ["close 2999", closeCodes],
      ["close now", closeCodes],
      [`close 4000 ${"é".repeat(62)}`, /at most 123 bytes/],
    ];
    const client = await RawClient.open(listen(), "on-demand");
    for (const [command, hint] of commandHints) {
      const reply = await client.ask(command);
      assert.match(reply!, hint, `${command}`);
      assert.doesNotMatch(reply!, /\n/);
    }
    client.send(...Array(9).fill("delay 60000 x"));
    assert.match((await client.nextText())!, tooManyDelays);
  });

  for (const code of [1000, 1003, 1007, 1014, 3000, 4999]) {
    test(`on-demand closes the connection with ${code} and the reason asked for`, async () => {
      const client = await RawClient.open(listen(), "on-demand");
      client.send(`close ${code} bye bye`);
      assert.equal(await client.closeReason(), `${code} bye bye`);
    });
  }

  test("on-demand shows address, URL and headers of the handshake, but no credentials", async () => {
    const headers = {
      "Sec-WebSocket-Protocol": "on-demand",
      "X-Forwarded-For": "192.0.2.1",
      "Cookie": "session=secret",
      "Authorization": "Basic secret",
    };
    const text = handshake(headers, "GET /a/../b/path?query HTTP/1.1");
    const client = await RawClient.openWith(listen(), text);
    const reply = (await client.ask("headers"))!;
    assert.doesNotMatch(reply, /secret/);
    const shown = JSON.parse(reply);
    assert.deepEqual(Object.keys(shown), ["address", "url", "headers"]);
    assert.equal(shown.address, client.address);
    assert.equal(shown.url, "http://localhost/b/path?query");
    assert.equal(shown.headers["x-forwarded-for"], "192.0.2.1");
    assert.equal(shown.headers.cookie, "(hidden)");
    assert.equal(shown.headers.authorization, "(hidden)");
  });
});

// ---- Messages -----------------------------------------------------------------------------------

describe("The subprotocols: reversing", () => {
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
    "U+FEFF at the beginning": ["\ufeffab", "ba\ufeff"],
    "no characters": ["", ""],
  };
  for (const [what, [text, reversed]] of Object.entries(reversedTexts)) {
    test(`a text with ${what} is reversed by what a reader sees as one character`, () => {
      assert.equal(reverse(text), reversed);
    });
  }

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
      assert.ok(isEqual, `${text.length} units, first ${JSON.stringify(text.slice(0, 20))}`);
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

describe("The subprotocols: messages", () => {
  for (const bytes of [[], [0], [1, 2, 255], Array.from({ length: 70_000 }, (_, i) => i & 255)]) {
    test(`a binary message of length ${bytes.length} comes back reversed, as bytes`, async () => {
      const socket = await connect(listen());
      const [reply] = await replies(socket, [Uint8Array.from(bytes)]);
      assert.ok(reply instanceof ArrayBuffer);
      assert.deepEqual([...new Uint8Array(reply)], bytes.toReversed());
    });
  }

  for (
    const [kind, opcode, reply] of [["text", TEXT, "zéyx"], ["binary", BINARY, "zyx"]] as const
  ) {
    test(`an empty ${kind} message gets an empty ${kind} reply in one frame`, async () => {
      const client = await RawClient.open(listen());
      client.socket.write(encodeFrame(opcode));
      assert.deepEqual(await client.nextFrame(), { fin: true, opcode, data: Buffer.alloc(0) });
    });

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

  test("a client that waits for each reply can send any number of messages", async () => {
    // Replies that the server did not forget would add up to more than unreadBytes.
    const client = await RawClient.open(listen({ limits: { unreadBytes: 100_000 } }));
    const texts = ["abc".repeat(100)];
    if (!onDeno) texts.push(""); // Deno does not tell whether empty messages have left
    for (const text of texts) {
      for (let i = 0; i < 2000; i++) assert.equal(await client.ask(text), reverse(text), `${i}`);
    }
  });

  // Deno cannot stop reading, so there the limit of unread messages is near.
  for (const [count, size] of [[onDeno ? 20_000 : 50_000, 5], [300, 65_536]]) {
    test(`${count} messages at once from a client that reads are answered in order`, async () => {
      const messages = Array.from({ length: count }, (_, n) => `${n}`.padEnd(size));
      const received = await replies(await connect(await listenSeparately()), messages);
      assert.ok(received.every((reply, n) => reply === reverse(messages[n])));
    });
  }

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

// ---- Add a subprotocol --------------------------------------------------------------------------

describe("Add a subprotocol", () => {
  test("a subprotocol without a handler sends no replies, and pings still get a pong", async () => {
    const client = await openAdded(() => {});
    client.send("x");
    client.socket.write(encodeFrame(PING, "alive"));
    assert.equal((await client.nextFrame())?.opcode, PONG);
  });

  test("a subprotocol knows its name, the client's address and the limits", async () => {
    const client = await openAdded(({ subprotocolName, address, limits }) => () =>
      `${subprotocolName} ${address} ${limits.messageBytes}`
    );
    assert.equal(await client.ask("?"), `added ${client.address} ${limits.messageBytes}`);
  });

  test("a subprotocol can send text and bytes before the client sends anything", async () => {
    const client = await openAdded((connection) => {
      connection.send("hello");
      connection.send(Uint8Array.of(1, 2));
    });
    assert.equal(await client.nextText(), "hello");
    assert.deepEqual([...(await client.nextFrame())!.data], [1, 2]);
  });

  test("a subprotocol sees how much a client has not read, until the client has read it", async () => {
    let measure = () => 0;
    const client = await openAdded((connection) => {
      measure = () => connection.unreadMemory;
      return () => connection.send(new Uint8Array(16_000_000)); // more than the kernel holds
    });
    assert.equal(measure(), 0);
    client.socket.pause();
    client.send("go");
    await eventually(() => assert.ok(measure() > 1_000_000, `${measure()}`), "much is unread");
    client.socket.resume();
    await client.nextFrame();
    await eventually(() => assert.equal(measure(), 0), "nothing is unread");
  });

  test("onclose is called once, though the server closes and the client answers", async () => {
    let calls = 0;
    const client = await openAdded((connection) => {
      connection.onclose = () => void calls++;
      return () => connection.close(4000, "that is all");
    });
    client.send("bye");
    assert.equal(await client.closeReason(), "4000 that is all");
    client.socket.write(closeFrame(4000));
    await once(client.socket, "close");
    assert.equal(calls, 1);
  });

  test("after close(), nothing is sent, and an onclose that is set then is called", async () => {
    let calls = 0;
    const client = await openAdded((connection) => {
      connection.close(4001, "not today");
      connection.onclose = () => void calls++;
      connection.send("too late");
    });
    const frame = await client.nextFrame();
    assert.equal(frame?.opcode, CLOSE);
    assert.equal(frame.data.toString("utf8", 2), "not today");
    assert.equal(calls, 1);
  });

  test("a subprotocol gets no message after it has closed the connection", async () => {
    let calls = 0;
    const client = await openAdded((connection) => () => {
      calls++;
      connection.close();
    });
    client.send(...Array(100).fill("x"));
    await client.closeReason();
    assert.equal(calls, 1);
  });

  test("send and close throw if the message, the code or the reason is not allowed", async () => {
    const { promise, resolve } = Promise.withResolvers<Connection>();
    await openAdded(resolve);
    const connection = await promise;
    assert.throws(() => connection.send(5 as unknown as string), TypeError);
    for (const code of [999, 1004, 1005, 1006, 1015, 2000, 5000, 1000.5]) {
      assert.throws(() => connection.close(code), RangeError, `${code}`);
    }
    assert.throws(() => connection.close(1000, "é".repeat(62)), RangeError);
  });

  test("an async handler's replies are sent when they are ready, in whatever order", async () => {
    const { promise, resolve } = Promise.withResolvers<void>();
    const client = await openAdded(() => async (message) => {
      if (message === "slow") await promise;
      return message;
    });
    client.send("slow");
    assert.equal(await client.ask("quick"), "quick");
    resolve();
    assert.equal(await client.nextText(), "slow");
  });

  test("a reply that is ready after close() is not sent", async () => {
    const client = await openAdded((connection) => async (message) => {
      await sleep(1);
      connection.close(4000, "that is all");
      await sleep(1);
      return message;
    });
    client.send("too late");
    const frame = await client.nextFrame();
    assert.equal(frame?.opcode, CLOSE);
    client.socket.write(closeFrame(4000));
    assert.equal(await client.nextFrame(), undefined);
  });

  const notAMessage = "TypeError: a message must be a string or a Uint8Array";
  const notAFunction =
    "TypeError: a subprotocol must return a function or nothing, and not be async";
  // This could steer a terminal, or forge a report. Each subprotocol below is sent it.
  const message = "\x1b[2J\n127.0.0.1:1 failed\x9b";
  // Subprotocols, and how the reports about them begin.
  const failures: Record<string, [code: string, ...reports: string[]]> = {
    "throws": ['() => () => fail("in message")', "Error: in message"],
    "rejects": ['() => async () => { await 0; fail("in promise"); }', "Error: in promise"],
    "repeats": [
      "() => (message) => fail(message)",
      "Error: \\u001b[2J\n  127.0.0.1:1 failed\\u009b",
    ],
    "gives-a-number": ["() => () => 5", notAMessage],
    "resolves-to-a-number": ["() => async () => 5", notAMessage],
    "cannot-be-shown": [
      '() => () => { throw { [Symbol.for("nodejs.util.inspect.custom")]: () => fail("") }; }',
    ],
    "open-throws": ['() => fail("in open")', "Error: in open"],
    "opens-with-a-number": ["() => 5", notAFunction],
    "opens-async": ["async () => {}", notAFunction],
    "opens-async-and-rejects": ['async () => fail("later")', notAFunction, "Error: later"],
    "long-reason": [
      '(connection) => connection.close(1000, "é".repeat(62))',
      "RangeError: a close reason must have at most 123 bytes in UTF-8",
    ],
    "close-throws": [
      '(connection) => { connection.onclose = () => fail("in close"); connection.close(1011); }',
      "Error: in close",
    ],
    "close-rejects": [
      '(connection) => { connection.onclose = async () => fail("late"); connection.close(1011); }',
      "Error: late",
    ],
  };
  const entries = Object.entries(failures).map(([name, [code]]) => `"${name}": ${code},`);
  const addFailures = `
    function fail(what) { throw new Error(what); }
    Object.assign(subprotocols, {${entries.join("\n")}});`;
  const programs: Record<string, () => Program> = {
    "server.ts with more subprotocols": () => startExtended(addFailures),
    "a program of one's own": () =>
      startOwnProgram(`
        import { serve, subprotocols } from "./server.ts";
        ${addFailures}
        const { port } = serve({ port: 0 });
        console.log("Listening on http://localhost:" + port + "/");`),
  };
  const title = "what fails in a subprotocol is reported and ends its own connection";
  testCases(title, programs, async (start) => {
    const program = start();
    const port = await program.port();
    const other = await RawClient.open(port);
    for (const [name, [, ...reports]] of Object.entries(failures)) {
      const client = await RawClient.open(port, name);
      const { address } = client;
      client.send(message);
      assert.match(await client.closeReason(), /^1011 /, name);
      for (const report of reports) {
        const line = RegExp.escape(`${address} failed in ${name}: ${report}`);
        await program.reports(new RegExp(`^${line}\n  +at .*`, "m"));
      }
      await assertReplies(other);
    }
    const expectedCount = Object.values(failures).flat().length - Object.keys(failures).length;
    assert.equal(program.err.match(/^\S.*$/gm)?.length, expectedCount, program.err);
  });

  test("an exception in a timer or a promise is reported, and server.ts goes on", async () => {
    const program = startExtended(`subprotocols["fails"] = () => {
      setTimeout(() => { throw new Error("in timer"); });
      Promise.reject(new Error("in promise"));
    };`);
    const port = await program.port();
    await RawClient.open(port, "fails");
    await program.reports(/^uncaught exception: Error: in timer\n +at /m);
    await program.reports(/^unhandled rejection: Error: in promise\n +at /m);
    await assertServes(port);
  });
});

// ---- In a program of your own -------------------------------------------------------------------

describe("In a program of your own", () => {
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
    const inUse = new RegExp(`port ${port} is in use; try another options.port`);
    assert.throws(() => serve({ port, reusePort: undefined }), inUse);
    const connecting = once(connectTcp(port, "::1"), "connect");
    await assert.rejects(connecting, "it listens on more than 0.0.0.0");
  });

  const wrongOrigins = ["", "*", "HOST", "example.org", "https://a.example/a", "ws://a.example"];
  const wrongOptions: [Options, RegExp][] = [
    [{ port: 65536 }, /port must be a whole number from 0 to 65535, not 65536/],
    [{ port: NaN }, /port must be a whole number from 0 to 65535, not NaN/],
    [{ defaultSubprotocol: "nope" }, /must be one of: dumb-increment-protocol, .*'nope'/],
    ...wrongOrigins.map((text): [Options, RegExp] => [{ origins: [text] }, /origin must be like/]),
    [{ hostname: "" }, /hostname must not be empty/],
    [{ hostname: "203.0.113.1" }, /^cannot listen on 203\.0\.113\.1:0: .*options\.hostname/],
    [{ cert: "x" }, /options\.cert and options\.key must be given together/],
    [{ key: "x" }, /options\.cert and options\.key must be given together/],
    [{ cert: "x", key: "x" }, /^cannot listen on .*options\.cert and options\.key/],
    [{ limits: { mesageBytes: 5 } as object }, /no limit named mesageBytes; .*: messageBytes, /],
  ];
  for (const [options, words] of wrongOptions) {
    test(`serve() says what is wrong with ${JSON.stringify(options)}, without naming a flag`, () => {
      const isRight = ({ message }: Error) => {
        assert.match(message, words);
        assert.doesNotMatch(message, /--/);
        return true;
      };
      assert.throws(() => serve({ port: 0, ...options }), isRight);
    });
  }

  test("a misspelt option, of serve or of Bun's, is a type error", async () => {
    const source = readFileSync(join(here, "server.ts"), "utf8");
    const misspell = (name: string, wrongName: string) => {
      assert.ok(source.includes(name));
      return source.replace(name, wrongName);
    };
    const folder = copyServer({
      "1.ts": 'import { serve } from "./server.ts"; serve({ help: true });',
      "2.ts": misspell("drain: (", "drian: ("),
      "3.ts": misspell("maxPayloadLength: limits", "maxPayLoadLength: limits"),
      "4.ts": misspell("maxPayloadLength: limits.messageBytes", 'maxPayloadLength: "8"'),
    });
    const files = [1, 2, 3, 4].map((n) => join(folder, `${n}.ts`));
    const program = new Program(process.execPath, ["check", ...files]);
    assert.equal(await program.exitStatus(), 1);
    const errors = [
      "'help' does not exist in type 'Options'",
      "'drian' does not exist in type",
      "'maxPayLoadLength' does not exist in type",
      "Type 'string' is not assignable to type 'number'",
    ];
    for (const error of errors) assert.ok(program.err.includes(error), `${error}\n${program.err}`);
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

// ---- Run it -------------------------------------------------------------------------------------

describe("Options", () => {
  /** Fails unless the program ends with status 1 and one line. */
  async function assertCannotStart(program: Program, words: RegExp): Promise<void> {
    assert.equal(await program.exitStatus(), 1);
    assert.equal(program.out, "");
    assert.match(program.err, /^Cannot start: [^\n]+\n$/);
    assert.match(program.err, words);
    assert.doesNotMatch(program.err, /options\./);
  }

  // With this hostname, which no machine has, the server says where it would listen, and ends.
  const nowhere = ["--hostname", "203.0.113.1"];
  const absent = join(here, "absent.pem");
  const wrongFile = join(here, "index.html");
  const namesLimits = new RegExp(`there is no limit named .*: ${Object.keys(limits).join(", ")}`);
  const wrongArgs: Record<string, [args: string[], words: RegExp, PORT?: string]> = {
    "an unknown flag": [["--unknown"], /--unknown/],
    "a word without a flag": [["extra"], /extra/],
    "a flag without its value": [["--port"], /--port/],
    "a flag with a value it does not take": [["--quiet=yes"], /quiet/],
    "a wrong --port": [["--port", "1e3"], /--port must be .* from 0 to 65535, not 1e3/],
    "an empty --port": [["--port="], /--port must be/],
    "a --port of two lines": [["--port", "x\ny"], /--port must be/],
    "an unknown --hostname": [["--hostname", "no-such-host.invalid"], /host\.invalid.*--hostname/],
    "--cert without --key": [["--cert", wrongFile], /--cert and --key must be given together/],
    "a --cert that is not there": [["--cert", absent, "--key", absent], /absent\.pem/],
    "a --cert that is none": [["--cert", wrongFile, "--key", wrongFile], /--cert and --key/],
    "an empty --origin": [["--origin", ""], /an origin must be like .*''/],
    "--limit with a name alone": [["--limit", "idleSeconds"], /idleSeconds must be .* 8 to 960/],
    "a --limit that is no number": [["--limit", "connections=many"], /from 1 to .*, not many/],
    "a --limit that does not exist": [["--limit", "idle=8"], namesLimits],
    "a --limit that changes objects": [["--limit", "__proto__=3"], namesLimits],
    "a wrong PORT of the environment": [[], /PORT must be .*, not abc/, "abc"],
    "an empty PORT, which is the same as none,": [nowhere, /203\.0\.113\.1:9000/, ""],
  };
  testCases(
    "wrong arguments end the start with a reason",
    wrongArgs,
    async ([args, words, PORT = "0"]) => {
      await assertCannotStart(startProgram(args, { PORT }), words);
    },
  );

  test("a port in use ends with status 1 and one line that names it and --port", async () => {
    const port = listen({ hostname: "0.0.0.0" });
    const program = startProgram(["--port", `${port}`]);
    await assertCannotStart(program, new RegExp(`port ${port} is in use; try another --port`));
  });

  test("a key of another certificate ends with status 1 and one line that says so", async () => {
    const [, cert] = certificate();
    const [, , , key] = certificate();
    const program = startProgram(["--cert", cert, "--key", key]);
    await assertCannotStart(program, /--cert and --key/);
  }, withoutOpenssl);

  const optionCases: Record<string, () => Promise<void>> = {
    "PORT of the environment is the port, unless --port is given": async () => {
      const program = startProgram(["--port", "0"], { PORT: "1" });
      await assertServes(await program.port());
    },
    "--hostname is the address on which the server listens, and which it prints": async () => {
      const program = startProgram(["--hostname", "127.0.0.1"]);
      const port = await program.port();
      assert.equal(program.out, `Listening on http://127.0.0.1:${port}/\n`);
      await assertServes(port);
    },
    "--default NAME serves clients that offer no subprotocol": async () => {
      const port = await startProgram(["--default", "echo"]).port();
      const client = await RawClient.openWith(port, handshake({ "Sec-WebSocket-Protocol": [] }));
      assert.equal(await client.ask("same"), "same");
    },
    "--limit changes a limit, and may be given for several": async () => {
      const args = ["--limit", "messageBytes=10", "--limit=connections=1"];
      const port = await startProgram(args).port();
      const client = await RawClient.open(port);
      assert.equal((await request(port, handshake())).status, 503);
      assert.equal(await client.ask("0123456789"), "9876543210");
      assert.match((await client.ask("01234567890"))!, /^03f1/); // a close frame with 1009
    },
    "--origin refuses pages of other origins, and lets in clients without an origin": async () => {
      const origins = ["https://A.example:443/", "https://b.example:8443"];
      const args = origins.flatMap((origin) => ["--origin", origin]);
      const port = await startProgram(args).port();
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
    },
  };
  for (const help of ["--help", "-h"]) {
    optionCases[`${help} explains each option, even beside a wrong one`] = async () => {
      const program = startProgram([help, "--port", "x"]);
      assert.equal(await program.exitStatus(), 0);
      const options = ["port", "hostname", "default", "origin", "limit", "cert", "key"];
      for (const option of [...options, "reuse-port", "quiet", "help"]) {
        assert.match(program.out, new RegExp(`^ +--${option} +\\S`, "m"));
      }
    };
  }
  testCases("each option does what --help says", optionCases, (run) => run());

  const addresses = Object.values(networkInterfaces()).flat();
  const hasIpv6 = addresses.some((entry) => entry?.address === "::1");
  const hostnames = { "with brackets": "[::1]", "without brackets": "::1" };
  testCases("--hostname takes an IPv6 address", hostnames, async (hostname) => {
    const program = startProgram(["--hostname", hostname]);
    const port = await program.port();
    assert.equal(program.out, `Listening on http://[::1]:${port}/\n`);
  }, !hasIpv6 && "this machine has no IPv6");

  test("a PORT that Deno may not read is the same as none, and nobody is asked", async () => {
    const args = ["run", "--allow-net", join(here, "server.ts"), ...nowhere];
    const program = new Program(process.execPath, args, { PORT: "1" });
    await assertCannotStart(program, /203\.0\.113\.1:9000/);
  }, !onDeno && "Bun may read every variable");

  test("--reuse-port lets two processes listen on one port", async () => {
    const port = await startProgram(["--reuse-port"]).port();
    const second = startProgram(["--port", `${port}`, "--reuse-port"]);
    assert.equal(await second.port(), port);
  }, !onLinux && "only Linux shares the connections of a port between processes");
});

describe("The log", () => {
  const text = (message: string) => encodeFrame(TEXT, message);
  const long = "x".repeat(80);
  const notUtf8 = onDeno ? '1006: "Invalid UTF-8"' : '1007: "Received invalid UTF-8"';
  const isTooBig = onDeno ? "message too big" : "Received too big message";
  // What a client of a subprotocol sends, and the lines after "connected".
  const logs: Record<string, [string, Buffer[], (string | RegExp)[]]> = {
    "each message and each reply, in the order of time": [
      NAME,
      [text("Hello, world!"), encodeFrame(BINARY, "abcde"), text(""), closeFrame(1000)],
      [
        'received "Hello, world!"',
        'sent "!dlrow ,olleH"',
        "received 5 bytes",
        "sent 5 bytes",
        'received ""',
        'sent ""',
        "closed with 1000",
      ],
    ],
    "what a subprotocol sends or closes by itself, after its cause": [
      "on-demand",
      [text("repeat 2 hello"), text("close 4001 bye")],
      [
        'received "repeat 2 hello"',
        'sent "hello"',
        'sent "hello"',
        'received "close 4001 bye"',
        'closed with 4001: "bye"',
      ],
    ],
    "nothing as sent that is not sent, since the connection is closed": [
      "late",
      [text("x")],
      ['sent "in time"', 'received "x"', "closed with 1000"],
    ],
    "control characters, line separators and bidi controls as escapes": [
      "silent",
      [text("\x1b[2J\r\n\x9b\u2028\u202e"), closeFrame(4000, "a\n\x1b")],
      [
        'received "\\u001b[2J\\u000d\\u000a\\u009b\\u2028\\u202e"',
        'closed with 4000: "a\\u000a\\u001b"',
      ],
    ],
    "80 units of a longer text": [
      "silent",
      [text(long), text(`${long}y`), closeFrame(1000)],
      [`received "${long}"`, `received "${long}…" (length 81)`, "closed with 1000"],
    ],
    "a close frame without a code as 1005": ["silent", [encodeFrame(CLOSE)], ["closed with 1005"]],
    "that a text was not UTF-8": [
      "silent",
      [encodeFrame(TEXT, Uint8Array.of(255))],
      [`closed with ${notUtf8}`],
    ],
    "that a frame was none": [
      "silent",
      [Buffer.of(255, 128, 0, 0, 0, 0)],
      [onDeno ? /^closed with 1006: "Reserved bits .*"$/ : /^closed with 1002: "Received .*"$/],
    ],
    "that a message was too long": [
      "silent",
      [encodeFrame(BINARY, new Uint8Array(limits.messageBytes + 1))],
      [`closed with 1009: "${isTooBig}"`],
    ],
    "the code that a client sent, though its reason imitates a runtime's": [
      "silent",
      [closeFrame(1000, "Received too big message")],
      ['closed with 1000: "Received too big message"'],
    ],
  };
  test("the log of a connection shows what happened, in the order of time", async () => {
    const program = startExtended(`
      subprotocols["silent"] = () => {};
      subprotocols["late"] = (connection) => {
        connection.send("in time");
        return async (message) => {
          connection.close();
          connection.send("too late");
          await 0;
          return message;
        };
      };
    `);
    const port = await program.port();
    for (const [what, [subprotocol, frames, lines]] of Object.entries(logs)) {
      const client = await RawClient.open(port, subprotocol);
      const { address } = client;
      client.socket.write(Buffer.concat(frames));
      const log = await program.logOf(address);
      const expected = [`connected, ${subprotocol}`, ...lines];
      assert.equal(log.length, expected.length, `${what}: ${log}`);
      for (const [i, line] of expected.entries()) {
        if (typeof line === "string") assert.equal(log[i], line, what);
        else assert.match(log[i], line, what);
      }
    }
    assert.equal(program.err, "");
  });

  test("a client that is cut off is logged with 1006", async () => {
    const program = startProgram();
    const port = await program.port();
    for (const end of ["end", "resetAndDestroy"] as const) {
      const client = await RawClient.open(port);
      const { address } = client;
      client.socket[end]();
      assert.match((await program.logOf(address))[1], /^closed with 1006/);
    }
  });

  test("a reply to a client that has already closed is not logged as sent", async () => {
    const program = startProgram();
    const client = await RawClient.open(await program.port(), "on-demand");
    const { address } = client;
    client.socket.pause();
    const frames = [...Array(12).fill(text("bytes 1000000")), text("bytes 3"), closeFrame(1000)];
    client.socket.write(Buffer.concat(frames));
    const log = await program.logOf(address);
    assert.deepEqual(log.slice(-2), ['received "bytes 3"', "closed with 1000"]);
  }, onDeno && "Deno does not stop reading, so the reply is sent");

  test("of HTTP requests, only refused handshakes are logged, with status and reason", async () => {
    const program = startProgram();
    const port = await program.port();
    await request(port, "GET / HTTP/1.0\r\n\r\n");
    await request(port, "HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    await request(port, handshake({ "Sec-WebSocket-Protocol": [] }));
    await request(port, handshake({}, "GET /?status=503 HTTP/1.1"));
    await program.prints(/refused with 503/);
    const [, first, second] = program.out.split("\n");
    assert.match(first, /^127.* refused with 400: Sec-WebSocket-Protocol must .*\(--default/);
    assert.match(second, /^127.* refused with 503: The URL asks for this status\.$/);
  });

  test("of a flood of messages, 100 lines are logged in 0.1 s and the rest is counted", async () => {
    const program = startProgram();
    const client = await RawClient.open(await program.port());
    await sleep(200); // so that a new tenth of a second begins
    client.send(...Array(5000).fill("x"));
    await eventually(() => {
      const shown = program.out.match(/ (received|sent) "x"$/gm)!.length;
      const counts = Array.from(program.out.matchAll(/^\((\d+) more lines\)$/gm));
      const skipped = counts.reduce((sum, [, count]) => sum + Number(count), 0);
      assert.equal(shown + skipped, 10_000);
    }, "each message and each reply is shown or counted");
    const [firstTenth] = program.out.split("more lines");
    assert.equal(firstTenth.match(/ (received|sent) "x"$/gm)?.length, 100);
  });

  test("of a flood of failures, 100 are reported in 0.1 s and the rest is counted", async () => {
    const program = startExtended(`
      subprotocols["fails"] = () => {
        for (let i = 0; i < 300; i++) Promise.reject(new Error("on purpose"));
      };
    `);
    await RawClient.open(await program.port(), "fails");
    await program.reports(/^\(200 more lines\)$/m);
    assert.equal(program.err.match(/Error: on purpose$/gm)?.length, 100);
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
    await program.prints(/^console\.log got 127\.0\.0\.1:\d+ sent "cba"$/m);
  });

  test("with --quiet, only the line that says where the server listens is printed", async () => {
    const program = startProgram(["--quiet"]);
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

describe("Stopping", () => {
  const STOP_REASON = "1001 the server is stopping";

  const stopCases: Record<string, () => Promise<void>> = {
    "two signals at once are the same as one": async () => {
      const program = startProgram();
      const client = await RawClient.open(await program.port());
      program.signal("SIGINT");
      program.signal("SIGINT");
      assert.equal(await client.closeReason(), STOP_REASON);
      client.socket.destroy();
      assert.equal(await program.exitStatus(), 0);
    },
  };
  for (const signal of ["SIGTERM", "SIGINT", "SIGHUP"] as const) {
    stopCases[`${signal} closes all clients with 1001 and ends with status 0`] = async () => {
      const program = startProgram();
      const port = await program.port();
      const answering = await connect(port);
      const silent = await RawClient.open(port);
      const { address } = silent;
      const half = RawClient.to(port);
      half.socket.write("GET / HTTP/1.1\r\n");
      const closed = once(answering, "close");
      program.signal(signal);
      const [{ code, reason }] = await closed;
      assert.equal(`${code} ${reason}`, STOP_REASON);
      assert.equal(await silent.closeReason(), STOP_REASON);
      assert.equal(await program.exitStatus(), 0);
      const closeLine = 'closed with 1001: "the server is stopping"';
      assert.deepEqual(await program.logOf(address), [`connected, ${NAME}`, closeLine]);
      assert.equal(program.err, "");
    };
  }
  if (onDeno) { // Bun does not wait for the clients, so it has stopped before a second signal
    stopCases["a second signal after more than half a second ends the server"] = async () => {
      const program = startProgram(["--limit", "stopSeconds=20"]);
      const client = await RawClient.open(await program.port()); // does not answer the close frame
      program.signal("SIGTERM");
      assert.equal(await client.closeReason(), STOP_REASON);
      await sleep(600); // since the server has heard the first signal
      program.signal("SIGTERM");
      assert.equal(await program.exitStatus(), 1);
    };
  }
  for (const task of onDeno ? ["start", "dev"] : []) {
    stopCases[`Ctrl+C under deno task ${task} is a signal to all its processes`] = async () => {
      const args = ["task", task, "--port", "0"];
      const program = new Program(process.execPath, args, {}, { detached: true });
      const interrupt = (signal: string) =>
        // sends it to all, as a terminal does
        spawnSync("sh", ["-c", `kill -s ${signal} -- -${program.child.pid}`]);
      cleanups.push(() => interrupt("KILL"));
      const client = await RawClient.open(await program.port());
      interrupt("INT");
      assert.equal(await client.closeReason(), STOP_REASON);
      assert.equal(await program.exitStatus(), 0);
      assert.doesNotMatch(program.err, /error|rejection|not reachable/i);
    };
  }
  testCases("a signal closes all clients and ends the server", stopCases, (run) => run());

  test("stop() closes all clients with 1001 and frees the port", async () => {
    const { port, stop } = startServer({ limits: { stopSeconds: 10 } });
    const client = await RawClient.open(port);
    const stopped = stop();
    assert.equal(await client.closeReason(), STOP_REASON);
    client.socket.destroy();
    await stopped;
    await assertServes(listen({ port }));
  });

  test("a handshake while the server stops is refused with 503", async () => {
    const { port, stop } = startServer({ limits: { stopSeconds: 10 } });
    const silent = await RawClient.open(port); // does not answer the close frame
    const late = RawClient.to(port);
    late.socket.write(handshake().slice(0, 50));
    await assertServes(port); // by now, the server has the first half of the handshake
    const stopped = stop();
    late.socket.write(handshake().slice(50));
    assert.equal((await late.nextResponse())?.status, 503);
    silent.socket.destroy();
    await stopped;
  }, !onDeno && "Bun does not wait for the clients");

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

describe("TLS", () => {
  /** Returns the options of a server that speaks TLS. */
  const tlsOptions = () => {
    const [, cert, , key] = certificate();
    return { cert: readFileSync(cert, "utf8"), key: readFileSync(key, "utf8") };
  };

  /** Connects by TLS. */
  const connectSecurely = (port: number) =>
    new RawClient(connectTls({ port, host: "127.0.0.1", rejectUnauthorized: false }));

  /** Connects by WebSocket over TLS. Fails unless a message is answered. */
  async function assertServesSecurely(port: number): Promise<void> {
    const client = connectSecurely(port);
    client.socket.write(handshake());
    assert.equal((await client.nextResponse())?.status, 101);
    assert.equal(await client.ask("secret"), "terces");
  }

  /** Sends a request without a body by HTTP/2; returns the headers and the body. */
  async function requestHttp2(port: number, headers: Record<string, string>) {
    const client = connectHttp2(`https://localhost:${port}`, { rejectUnauthorized: false });
    cleanups.push(() => client.destroy());
    const stream = client.request({ ":path": "/", ...headers }, { endStream: true });
    const [responseHeaders] = await once(stream, "response");
    const chunks = await Array.fromAsync(stream);
    return [responseHeaders as IncomingHttpHeaders, chunks.join("")] as const;
  }

  test("with --cert and --key, the page comes by https and messages by wss", async () => {
    const program = startProgram([...certificate()]);
    const port = await program.port();
    assert.equal(program.out, `Listening on https://localhost:${port}/\n`);
    const client = connectSecurely(port);
    client.socket.write("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert.equal((await client.nextResponse())?.body, page);
    await assertServesSecurely(port);
  }, withoutOpenssl);

  test("a certificate and its key may be in one file, in either order", async () => {
    const { cert, key } = tlsOptions();
    for (const both of [cert + key, key + cert]) {
      await assertServesSecurely(listen({ cert: both, key: both }));
    }
  }, withoutOpenssl);

  test("the page also comes by HTTP/2, which browsers prefer", async () => {
    const port = listen(tlsOptions());
    const [headers, body] = await requestHttp2(port, { ":method": "GET" });
    assert.equal(headers[":status"], 200);
    assert.equal(body, page);
    const [refusal] = await requestHttp2(port, { ":method": "POST" });
    assert.equal(refusal[":status"], 405);
    assert.equal(refusal.allow, "GET, HEAD");
  }, withoutOpenssl);

  test("a handshake by HTTP/2, as curl sends it, is told that it needs HTTP/1.1", async () => {
    const [headers, body] = await requestHttp2(listen(tlsOptions()), {
      "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
      "sec-websocket-version": "13",
      "sec-websocket-protocol": NAME,
    });
    assert.equal(headers[":status"], 400);
    assert.match(body, /WebSockets need HTTP\/1\.1 \(for curl: --http1\.1\)/);
  }, withoutOpenssl);
});

// ---- Limits -------------------------------------------------------------------------------------

describe("Limits", () => {
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

  test("with messageBytes of 16 MiB, messages of 13 MB are answered one after the other", async () => {
    const client = await RawClient.open(listen({ limits: { messageBytes: 16 * 1024 * 1024 } }));
    const frame = encodeFrame(BINARY, Buffer.alloc(13_000_000));
    for (let i = 0; i < 2; i++) {
      client.socket.write(frame);
      assert.equal((await client.nextFrame())?.data.length, 13_000_000);
    }
  });

  const ranges: [keyof typeof limits, number, number][] = [
    ["messageBytes", 1, 64 * 1024 * 1024 - 1],
    ["unreadBytes", 64 * 1024, 2 ** 40],
    ["allUnreadBytes", 64 * 1024, 2 ** 40],
    ["connections", 1, 2 ** 40],
    ["idleSeconds", 8, 960],
    ["stopSeconds", 0, 3600],
  ];
  for (const [name, least, greatest] of ranges) {
    test(`limits.${name} may be ${least} to ${greatest}, and no other value`, async () => {
      for (const value of [least, greatest]) {
        const client = await RawClient.open(listen({ limits: { [name]: value } }));
        assert.equal(await client.ask("x"), "x");
        client.socket.destroy();
      }
      const range = new RegExp(`${name} must be a whole number from ${least} to ${greatest},`);
      for (const value of [least - 1, greatest + 1, least + 0.5, NaN, Infinity]) {
        assert.throws(() => serve({ port: 0, limits: { [name]: value } }), range, `${value}`);
      }
    });
  }

  const assertFull = async (port: number) => {
    const { status, header } = await request(port, handshake());
    assert.equal(status, 503);
    assert.ok(Number(header("retry-after")[0]) > 0);
  };

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

  test("of twenty handshakes at once, those without room are closed with 1013", async () => {
    const port = listen({ limits: { connections: 3 } });
    const clients = Array.from({ length: 20 }, () => RawClient.to(port));
    for (const { socket } of clients) socket.write(handshake());
    const responses = await Promise.all(clients.map((client) => client.nextResponse()));
    const accepted = clients.filter((_client, i) => responses[i]?.status === 101);
    const received = await Promise.all(accepted.map((client) => client.ask("stay")));
    assert.equal(received.filter((reply) => reply === "yats").length, 3);
    const others = received.filter((reply) => reply !== "yats");
    for (const frame of others) assert.match(frame!, /^03f5/, "the code of a close frame, 1013");
    await eventually(() => assertFull(port), "the server is full");
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

  const idleEnd = onDeno ? /^1001 / : /^cut$/;

  /** Returns the next frame that is neither a ping nor a pong. */
  async function nextMessage(client: RawClient): Promise<Frame | undefined> {
    let frame = await client.nextFrame();
    while (frame?.opcode === PING || frame?.opcode === PONG) frame = await client.nextFrame();
    return frame;
  }

  // Ten times as long, a silent client does not stay: Deno ends it after 8 s, Bun after 8 to 10 s.
  const tenth = onDeno ? 900 : 1050;

  // Each of these takes 8 to 11 s.
  const idleCases: Record<string, () => Promise<void>> = {
    "a client that answers pings stays; one that does not is ended and makes room": async () => {
      const port = listen({ limits: { idleSeconds: 8, connections: 2 } });
      const living = await connect(port);
      const dead = await RawClient.open(port);
      assert.equal((await dead.nextFrame())?.opcode, PING);
      assert.match(await dead.closeReason(), idleEnd);
      assert.deepEqual(await replies(living, ["alive"]), ["evila"]);
      await eventually(() => RawClient.open(port), "there is room");
      await assertFull(port);
    },
    "a client that only gets messages is pinged after half of the time, then ended": async () => {
      const client = await RawClient.open(listen({ limits: { idleSeconds: 8 } }), "count");
      const opcodes: number[] = [];
      let frame = await client.nextFrame();
      while (frame?.opcode === TEXT || frame?.opcode === PING) {
        opcodes.push(frame.opcode);
        frame = await client.nextFrame();
      }
      assert.equal(frame?.opcode, onDeno ? CLOSE : undefined);
      const secondsBeforePing = opcodes.indexOf(PING); // since count sends one text a second
      assert.ok(secondsBeforePing >= 2 && secondsBeforePing <= 5, `${opcodes}`);
      assert.ok(opcodes.length > 6, `${opcodes}`);
    },
    "a client that reads slowly gets all, and stays": async () => {
      const port = await startProgram(["--limit", "idleSeconds=8"]).port();
      const client = await RawClient.open(port, "on-demand");
      client.send(`repeat 100 ${"x".repeat(100_000)}`); // until all is read, it sends no more
      for (let i = 1; i <= 100; i++) {
        const message = await nextMessage(client);
        assert.equal(message?.data.length, 100_000, `message ${i}`);
        if (i % 10 > 0) continue;
        client.socket.pause();
        await sleep(tenth);
        client.socket.resume();
      }
      if (onDeno) return; // Deno then ends it, since it has answered no ping
      client.send("bytes 1");
      assert.equal((await nextMessage(client))?.data.length, 1);
    },
    "SIGSTOP for longer than idleSeconds ends no client that answers": async () => {
      const program = startProgram(["--limit", "idleSeconds=8"]);
      const clients = [await connect(await program.port()), await connect(await program.port())];
      program.signal("SIGSTOP");
      await sleep(8500);
      program.signal("SIGCONT");
      await sleep(1000); // if the server ended its clients, it would do so now
      for (const client of clients) assert.deepEqual(await replies(client, ["alive"]), ["evila"]);
    },
  };
  const signs: Record<string, (client: RawClient) => unknown> = {
    "messages": (client) => client.send("life"),
    "pongs": (client) => client.socket.write(encodeFrame(PONG)),
  };
  const closers = ["server"];
  if (!onDeno) {
    signs["pings"] = (client) => client.socket.write(encodeFrame(PING)); // Deno wants pongs
    closers.push("client"); // Deno frees what such a client has not read
    idleCases["a client that reads nothing is closed with 1008"] = async () => {
      const flood = listenForFloods(1, 16_000_000, { idleSeconds: 8 });
      assert.equal(await closeReasonUnread(flood), "1008 too many unread messages");
    };
  }
  for (const [what, showLife] of Object.entries(signs)) {
    idleCases[`a client that sends ${what} stays, though it answers no ping`] = async () => {
      const client = await RawClient.open(listen({ limits: { idleSeconds: 8 } }));
      for (let i = 0; i < 10; i++) {
        showLife(client);
        await sleep(tenth);
      }
      client.send("last");
      let message = await nextMessage(client);
      while (`${message?.data}` === "efil") message = await nextMessage(client);
      assert.equal(`${message?.data}`, "tsal");
    };
  }
  for (const closer of closers) {
    idleCases[`what is unread when the ${closer} closes counts for idleSeconds`] = async () => {
      const limits = { idleSeconds: 8, connections: 1, unreadBytes: 1024 * 1024 };
      const count = closer === "server" ? 2 : 1; // the second message is more than a client may have
      const { port, closed } = listenForFloods(count, 24_000_000, limits);
      const client = await RawClient.open(port, "added");
      client.socket.pause();
      client.send("go");
      if (closer === "client") client.socket.write(closeFrame(1000));
      await closed();
      for (let i = 0; i < 20; i++) {
        if (closer === "server") client.send("once it has sent the close frame, Deno cuts at this");
        await sleep(100);
        await assertFull(port);
      }
      await eventually(() => assertServes(port), "there is room");
    };
  }
  testCases("signs of life within idleSeconds", idleCases, (run) => run());
});

// ---- Clients that do not read -------------------------------------------------------------------

describe("Clients that do not read", () => {
  const cannotPause = onDeno && "Deno cannot stop reading from a client";
  const pauses = !onDeno && "Bun stops reading from such a client instead";

  test("a client that reads slowly, and has much under way, gets every reply", async () => {
    const [count, underWayCount] = onDeno ? [8000, 4000] : [25_000, 20_000];
    const client = await RawClient.open(await listenSeparately());
    let sent = 0;
    for (let received = 0; received < count; received++) {
      const next = Math.min(count, received + underWayCount);
      const numbers = Array.from({ length: next - sent }, (_, i) => sent + i);
      client.send(...numbers.map((number) => `${number}`.padEnd(1000)));
      sent = next;
      const reply = await client.nextText();
      assert.equal(reply?.trim(), reverse(`${received}`));
      if (received % 100 > 0) continue;
      client.socket.pause();
      await sleep(5); // this is what makes it slow
      client.socket.resume();
    }
  });

  test("on-demand does all commands at once, even if their replies pass the limit", async () => {
    const port = listen({ limits: { unreadBytes: 4 * 1024 * 1024 } });
    const socket = await connect(port, "on-demand");
    const received = await replies(socket, Array(20).fill("bytes 1000000"));
    for (const reply of received) assert.equal((reply as ArrayBuffer).byteLength, 1_000_000);
  }, cannotPause);

  for (const size of [65_536, 16, 0]) {
    test(`a client that floods messages of ${size} bytes, unread, is closed`, async () => {
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
      for (let i = 0; i < 200 && !isClosed; i++) {
        flooding.send(...messages);
        await assertReplies(other);
      }
      assert.ok(isClosed, "it was not closed");
      flooding.socket.resume();
      assert.match(await flooding.closeReason(), /^1008 .|^cut$/); // the flood may go on meanwhile
    }, pauses);
  }

  test("a client over the limit that goes on reading gets 1008, not a reset", async () => {
    const client = await RawClient.open(listen({ limits: { unreadBytes: 500_000 } }));
    client.send(...Array(3000).fill("x".repeat(1000)));
    assert.equal(await client.closeReason(), "1008 too many unread messages");
  }, pauses);

  test("a client that has left more unread than unreadBytes is closed with 1008", async () => {
    const flood = listenForFloods(100, 200_000, { unreadBytes: 1024 * 1024 });
    assert.equal(await closeReasonUnread(flood), "1008 too many unread messages");
  });

  test("what a client has left unread counts no more once the client is gone", async () => {
    const { port, closed } = listenForFloods(60, 100_000, { allUnreadBytes: 16 * 1024 * 1024 });
    for (let i = 0; i < 8; i++) {
      const silent = await RawClient.open(port, "added");
      silent.send("go");
      await silent.nextFrame();
      silent.socket.resetAndDestroy();
    }
    await closed(8);
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
    const { port } = listenForFloods(6, 1_000_000, { allUnreadBytes: 12 * 1024 * 1024 });
    const client = await connect(port, "added");
    for (let i = 0; i < 12; i++) {
      const received = collect(client, 6);
      client.send("go");
      await received;
    }
  });

  test("a closed client that reads slowly, and sends, gets all before the close frame", async () => {
    const count = 20;
    const client = await openAdded((connection) => () => {
      for (let i = 0; i < count; i++) connection.send(new Uint8Array(1_000_000));
      connection.close(4001, "bye");
    });
    client.send("go");
    for (let i = 0; i < count; i++) {
      assert.equal((await client.nextFrame())?.data.length, 1_000_000, `message ${i}`);
      client.socket.pause();
      if (i < count / 2) client.send("still here");
      await sleep(40);
      client.socket.resume();
    }
    assert.equal(await client.closeReason(), "4001 bye");
  });

  test("what a client sends before its close frame is received, however much is unread", async () => {
    let count = 0;
    const client = await openAdded((connection) => (message) => {
      if (message === "send") connection.send(new Uint8Array(1_000_000));
      if (message === "count") count++;
    });
    client.socket.pause();
    const texts = [...Array(10).fill("send"), ...Array(5).fill("count")];
    const frames = texts.map((text) => encodeFrame(TEXT, Buffer.from(text)));
    client.socket.write(Buffer.concat([...frames, closeFrame(1000)]));
    await eventually(() => assert.equal(count, 5), "five messages are counted");
  });

  test("when others leave too much unread, a client that reads is not closed", async () => {
    const { port } = listenForFloods(1, 16 * 1024 * 1024, { allUnreadBytes: 1024 * 1024 });
    const silent = await RawClient.open(port, "added");
    silent.send("go");
    silent.socket.pause();
    const reading = await RawClient.open(port, "echo");
    const text = "x".repeat(200_000);
    for (let i = 0; i < 5; i++) assert.ok(await reading.ask(text) === text, `message ${i}`);
  });
});

// ---- What each runtime cannot do ----------------------------------------------------------------

describe("What each runtime cannot do", () => {
  const random = randomNumbers(11);
  const randomBytes = (count: number) =>
    Buffer.from(Array.from({ length: count }, () => random(256)));
  const damage = (data: Buffer) => {
    for (let i = 0; i < 3; i++) data[random(data.length)] = random(256);
    return data;
  };
  const afterHandshake = (...frames: Buffer[]) =>
    Buffer.concat([Buffer.from(handshake()), ...frames]);
  const longFrame = encodeFrame(TEXT, "x".repeat(70_000));
  const attacks: Record<string, () => Buffer> = {
    "random bytes": () => randomBytes(random(2000)),
    "half a request": () => Buffer.from(handshake().slice(0, random(200))),
    "a damaged request": () => damage(Buffer.from(handshake())),
    "a long header": () => Buffer.from(handshake({ "X-Long": "x".repeat(random(200_000)) })),
    "random frames": () => afterHandshake(randomBytes(random(2000))),
    "a damaged frame": () =>
      afterHandshake(damage(encodeFrame(random(16), randomBytes(random(200))))),
    "half a frame": () => afterHandshake(longFrame.subarray(0, random(70_000))),
    "many pings": () => afterHandshake(...Array(random(2000)).fill(encodeFrame(PING, "x"))),
  };
  testCases("a hundred clients that send nonsense disturb no other", attacks, async (encode) => {
    const port = listen();
    const other = await RawClient.open(port);
    const attack = async () => {
      const { socket } = RawClient.to(port);
      const written = new Promise((resolve) => socket.write(encode(), resolve));
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

  test("a handshake with Content-Length: 0 is accepted on Bun, and refused with 400 by Deno", async () => {
    const { status } = await request(listen(), handshake({ "Content-Length": "0" }));
    assert.equal(status, onDeno ? 400 : 101);
  });

  test("a frame without a mask is answered by Deno; Bun closes with 1002", async () => {
    const client = await RawClient.open(listen());
    client.socket.write(Uint8Array.of(128 | TEXT, 2, 97, 98));
    const frame = await client.nextFrame();
    assert.equal(frame?.data.toString("hex", 0, 2), onDeno ? "6261" : "03ea"); // "ba" or 1002
  });

  test("headers of 20 KB are refused with 431 by Bun, headers of 70 KB with 400 by Deno", async () => {
    const refusal = async (length: number) =>
      (await request(listen(), handshake({ "Cookie": "x".repeat(length) }))).status;
    assert.equal(await refusal(20_000), onDeno ? 101 : 431);
    assert.equal(await refusal(70_000), onDeno ? 400 : 431);
  });

  test("without file descriptors, the server goes on and keeps its connections", async () => {
    const server = [...runtimeArgs, join(here, "server.ts"), "--port", "0", "--quiet"];
    const shellLine = 'ulimit -n 60; exec "$0" "$@"';
    const program = new Program("sh", ["-c", shellLine, process.execPath, ...server]);
    const port = await program.port();
    const other = await RawClient.open(port);
    const crowd = Array.from({ length: 100 }, () => RawClient.to(port));
    for (const { socket } of crowd) socket.write(handshake());
    const statuses = crowd.map(async (client) => (await client.nextResponse())?.status);
    await Promise.any(statuses.map(async (status) => assert.equal(await status, 101)));
    await assertReplies(other);
    for (let i = 0; i < 5; i++) { // meanwhile, Deno tries to listen again
      crowd.push(RawClient.to(port));
      await sleep(100);
    }
    for (const { socket } of crowd) socket.destroy();
    const accepted = (await Promise.all(statuses)).filter((status) => status === 101);
    assert.ok(accepted.length < 100, "it did not run out of file descriptors");
    await eventually(() => assertServes(port), "it serves again");
    await assertReplies(other);
    if (!onDeno) return; // Bun does not stop listening
    await eventually(() => {
      const reports = program.err.match(/^(stopped listening|listening again)/gm)!;
      assert.match(`${reports}`, /^(stopped listening,listening again,?)+$/);
    }, "each stop is reported once");
  }, !onLinux && "it takes Linux to count file descriptors as here");
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
}
const { Bun: bun } = globalThis as { Bun?: { WebView: new (options: object) => View } };
const chromium = process.env.CHROMIUM ?? "/usr/bin/chromium";
const pageSkipped = bun
  ? without("Chromium", existsSync(chromium), "apt-get install chromium, or set CHROMIUM")
  : "needs Bun's WebView";

/** A test of the page alone, with a server in this process. */
function pageTest(name: string, run: () => Promise<void>): void {
  test(name, run, pageSkipped);
}

const runtimes = { Deno: ["deno", ...denoArgs], Bun: [process.execPath] };
const runtimesSkipped = pageSkipped ||
  without("Deno", spawnSync("deno", ["--version"]).status === 0);

/** A test of the page with a server on each runtime, side by side. */
function pageTestOnRuntimes(
  name: string,
  run: (start: (...options: string[]) => Program) => Promise<void>,
): void {
  testCases(name, runtimes, ([command, ...args]) => {
    const server = [...args, join(here, "server.ts"), "--port", "0"];
    return run((...options) => new Program(command, [...server, ...options]));
  }, runtimesSkipped);
}

/** Views of Chromium whose tests have ended. To open another one would take 0.3 s. */
const idleViews: View[] = [];

/** Opens a page in Chromium. */
async function browse(url: string): Promise<View> {
  const switches = ["no-sandbox", "disable-background-networking", "disable-component-update"];
  const argv = [...switches, "disable-sync", "ignore-certificate-errors"].map((s) => `--${s}`);
  const backend = { type: "chrome", url: false, path: chromium, argv };
  const view = idleViews.pop() ?? new bun!.WebView({ backend });
  cleanups.push(async () => {
    await view.evaluate("document.getElementById('close')?.click()"); // so it makes no more tries
    idleViews.push(view);
  });
  await view.navigate(url);
  await view.resize(800, 600);
  // Chromium drops what is typed before the page is painted.
  await view.evaluate("new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)))");
  return view;
}

/** Opens the page of a server, by default of a new one, and waits until it is connected. */
async function browseConnected(query = "", port = listen()): Promise<View> {
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

/** Sends a message, given as code. The field is hidden, since to lay out 1 MiB takes seconds. */
async function submit(view: View, message: string): Promise<void> {
  await view.evaluate(
    `message.hidden = true, message.value = ${message}, form.requestSubmit(), message.hidden = false`,
  );
}

/** Fills in the fields of Connection and presses Connect or Close. */
async function use(view: View, button: "connect" | "close", fields: object): Promise<void> {
  const byId = (id: string) => `document.getElementById("${id}")`;
  const steps = Object.entries(fields).map(([id, value]) =>
    `${byId(id)}.value = ${JSON.stringify(value)}`
  );
  await view.evaluate([...steps, "connection.open = true", `${byId(button)}.click()`].join());
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
const grey = `${color} === "rgb(185, 192, 201)"`;
const noError = `log.querySelector(".error") === null`;

/** The number of rows that match. */
const rows = (pattern: RegExp) =>
  `[...log.children].filter((row) => ${pattern}.test(row.textContent)).length`;
const row = (pattern: RegExp) => `${rows(pattern)} > 0`;

/** The message in the row that was opened first. */
const opened = `log.querySelector("details[open] .whole")`;
const open = (view: View) => view.evaluate(`log.querySelector("summary")?.click()`);

/** Notes the page's pauses before new tries, and makes them last 2 % of their time. */
const hurry = `(() => {
  globalThis.pauses = [];
  const { setTimeout } = globalThis;
  globalThis.setTimeout = (run, milliseconds) => {
    if (milliseconds > 100) pauses.push(milliseconds); // the log has shorter ones
    return setTimeout(run, milliseconds / 50);
  };
})()`;

const fieldTop = "message.getBoundingClientRect().top + scrollY";

const runTimes = (view: View, text: string, number: number) =>
  view.evaluate(`times.open = true, message.value = ${JSON.stringify(text)},
    document.getElementById("number").value = ${number}, run.click()`);

describe(pageSkipped ? `the page (skipped: ${pageSkipped})` : "the page", () => {
  // ---- The log

  pageTest("shows messages as text, never as markup, the newest first", async () => {
    const view = await browseConnected();
    await enter(view, "<b>bold</b><script>document.title = 1</script>");
    await shows(view, row(/→<b>bold<\/b><scr/), row(/←>tpircs\/<.*>b\/<dlob>b</));
    await shows(view, "log.querySelector('b, script') === null", "document.title !== '1'");
    await enter(view, "last");
    await shows(view, row(/←tsal/));
    const top = (name: string) => `log.${name}.getBoundingClientRect().top`;
    await shows(view, `${top("lastElementChild")} < ${top("firstElementChild")}`);
    await shows(view, `${top("lastElementChild")} + 30 < innerHeight`, "scrollY === 0");
  });

  pageTest("shows what is unseen, empty, the same again, or no text, in one line", async () => {
    const view = await browseConnected("?protocol=echo");
    const texts: [string, string][] = [
      ["a\tb\nc\u0007\u202ed", "a\\\\tb\\\\nc\\\\u0007\\\\u202ed"], // control characters, bidi control
      ["", "\\(empty\\) 0 bytes"],
      ["racecar", "racecar 7 bytes"],
      ["a\ud800b", "a\ufffdb 5 bytes"], // half a surrogate pair is sent as U+FFFD
      ["Z" + "\u0301".repeat(90), "Z\u0301+ 181 bytes"],
    ];
    for (const [text, shown] of texts) {
      await submit(view, JSON.stringify(text));
      await shows(view, row(new RegExp(`→${shown}`)), row(new RegExp(`←${shown}`)));
    }
    // Piled up combining marks end at their row.
    await shows(view, `getComputedStyle(log.lastElementChild).overflowY === "clip"`);
  });

  pageTest("shows the beginning of a long message, without half a character", async () => {
    const view = await browseConnected("?protocol=echo");
    for (const character of ["😀", "🇩🇪", "e\u0301", "👩‍👩‍👧", "\u1100\u1161\u11a8"]) {
      await submit(view, `"a" + "${character}".repeat(300)`);
      await shows(view, row(new RegExp(`←a(${character})+ …`, "u")));
    }
    await view.click("#hex");
    await submit(view, `"0f".repeat(300)`);
    await shows(view, row(/←0f( 0f)+ … 300 bytes/));
  });

  pageTest("opens a message that its row does not show as it is, up to a length", async () => {
    const view = await browseConnected("?protocol=echo");
    const cases: [string, number, number | undefined, string?][] = [
      ["x", 200, undefined],
      ["x\n", 1, 2],
      ["x", 100_000, 100_000],
      ["x", 150_001, 100_000, "50,001 characters more"],
      ["🇩🇪", 30_001, 100_000, "20,004 characters more"],
      ["0f", 33_334, 33_333 * 3 - 1, "1 byte more"], // as hex: 0f 0f 0f
    ];
    for (const [part, times, length, more] of cases) {
      await view.evaluate(`log.replaceChildren(), hex.checked = ${part === "0f"}`);
      await submit(view, `${JSON.stringify(part)}.repeat(${times})`);
      await shows(view, row(/←/));
      await open(view);
      await shows(view, `${opened}?.textContent.length === ${length}`);
      const note = `log.querySelector("details small")?.textContent`;
      await shows(view, `${note} === ${JSON.stringify(more)}`);
    }
  });

  pageTest("keeps an opened row and the focus while newer rows arrive", async () => {
    let push: (message: Message) => void;
    const port = listenWith((connection) => {
      push = (message) => connection.send(message);
    });
    const view = await browseConnected("?protocol=added", port);
    push!("long ".repeat(100));
    push!("newer");
    await shows(view, row(/newer/));
    const above = `${fieldTop} + log.lastElementChild.getBoundingClientRect().bottom`;
    const before = await view.evaluate(above);
    await view.evaluate("log.querySelector('summary').focus()");
    await view.press("Enter");
    await shows(view, `${opened}?.ariaLive === "off"`, `${above} === ${before}`);
    for (let i = 0; i < 300; i++) push!(`number ${i}`);
    await shows(view, logged("number 299"), "log.children.length === 200");
    await shows(view, `${opened} !== null`, "document.activeElement.localName === 'summary'");
    await view.press("Enter");
    push!("one more");
    await shows(view, logged("one more"), "log.querySelector('details').open === false");
    await view.evaluate("message.focus()");
    push!("last");
    await shows(view, logged("last"), "log.querySelector('details') === null");
  });

  pageTest("has the accessibility tree read direction, text, size, time, once", async () => {
    const view = await browseConnected();
    await view.evaluate(`(() => {
      globalThis.changes = 0; // of rows that are there: these would be read again
      const options = { childList: true, characterData: true, attributes: true, subtree: true };
      const count = (records) => changes += records.filter(({ target }) => target !== log).length;
      new MutationObserver(count).observe(log, options);
    })()`);
    await enter(view, "Hello, world!");
    await enter(view, "second");
    await shows(view, row(/←!dlrow/), row(/←dnoces/), "changes === 0");
    const { nodes } = await view.cdp("Accessibility.getFullAXTree") as { nodes: Node[] };
    type Node = Record<"role" | "name", { value: string } | undefined> & {
      nodeId: string;
      childIds: string[];
    };
    const read = ({ role, name, childIds }: Node): string[] => {
      if (["StaticText", "image"].includes(role!.value)) return [name?.value.trim() ?? ""];
      return childIds.flatMap((id) => read(nodes.find(({ nodeId }) => nodeId === id)!));
    };
    const log = nodes.find(({ role }) => role?.value === "log")!;
    assert.equal(log.name?.value, "Messages");
    const words = read(log).filter(Boolean).join(" | ");
    assert.match(words, /sent \| Hello, world! \| 13 bytes \| \d\d:\d\d:\d\d/);
    assert.match(words, /received \| !dlrow ,olleH \| 13 bytes \| \d\d:\d\d:\d\d\S* \| in .* ms/);
    assert.doesNotMatch(words, /[→←]/);
  });

  pageTest("shows each message once to both members of a chat", async () => {
    const port = listen();
    const sender = await browseConnected("?protocol=chat", port);
    const other = await browseConnected("?protocol=chat", port);
    await enter(sender, "hello all");
    await shows(sender, `${rows(/→.*hello all/)} === 1`, `${rows(/←.*hello all/)} === 1`);
    await shows(other, `${rows(/→/)} === 0`, `${rows(/←.*hello all/)} === 1`);
    await shows(sender, `${rows(/ ms$/)} === 0`, noError);
  });

  pageTest("shows the whole of an opened message, so that it is copied exactly", async () => {
    const hostile = "\t<b>not bold</b>  \u202eright to left \u2069\u2069\u0000\u0007\u2028\n\r\n";
    const text = `${hostile}${"long line ".repeat(40)}\n  🇩🇪 e\u0301 \n\n`;
    const bytes = Buffer.from(Array.from({ length: 256 }, (_, i) => i));
    const hex = bytes.toString("hex").replace(/..(?!$)/g, "$& ");
    for (const [message, expected] of [[text, text], [bytes, hex]] as const) {
      const port = listenWith((connection) => connection.send(message));
      const view = await browseConnected("?protocol=added", port);
      await shows(view, row(/←\\t<b>not bold<\/b> .* …|←00 01 02 .* …/), `${opened} === null`);
      await open(view);
      await shows(view, `${opened} !== null`, "log.querySelector('b') === null");
      assert.equal(await view.evaluate(`${opened}.textContent`), expected);
      const copied = `getSelection().selectAllChildren(${opened}), getSelection().toString()`;
      assert.equal(await view.evaluate(copied), expected);
      // As a paragraph of its own, it does not change the direction of what is around it.
      await shows(view, `getComputedStyle(${opened}).display === "block"`);
    }
  });

  // ---- Connecting

  pageTest("connects to the server of ?server=, and to another one with Connect", async () => {
    const silent = `ws://127.0.0.1:${await listenSilently()}/any/path`;
    const [first, second] = [listen(), listen()].map((port) => `ws://127.0.0.1:${port}/any/path`);
    const view = await browse(`http://localhost:${listen()}/?server=${silent}`);
    await shows(view, state("connecting"), amber, status(`Connecting to ${silent}`));
    await view.navigate(`http://localhost:${listen()}/?server=${first}&protocol=echo`);
    await shows(view, state("connected"), status(first), status("echo"));
    await shows(view, `address.value === "${first}"`, "protocol.value === 'echo'");
    await use(view, "connect", { address: second, protocol: NAME });
    await shows(view, state("connected"), status(second), status(NAME));
    await submit(view, `"Hello"`);
    await shows(view, row(/←olleH/), `${rows(/closed the connection/)} === 1`, noError);
  });

  pageTest("opens Connection and explains when the address is wrong", async () => {
    const port = listen();
    const view = await browse(`http://localhost:${port}/?server=nonsense`);
    for (const wrong of ["nonsense", "", "ftp://localhost/"]) {
      if (wrong !== "nonsense") await use(view, "connect", { address: wrong });
      await shows(view, state("failed"), red, "connection.open");
      await shows(view, includes("addressError", `“${wrong}” is not usable`));
      await use(view, "connect", { address: `ws://localhost:${port}/` });
      await shows(view, state("connected"), `${textOf("addressError")} === ""`);
      await view.evaluate("connection.open = false");
    }
  });

  pageTest("sends the query of the page to the server as it was typed", async () => {
    const view = await browseConnected("?token=a%20b~&protocol=on-demand&x=%41+");
    await shows(view, status("/?token=a%20b~&x=%41+, subprotocol on-demand"));
    await enter(view, "headers");
    await shows(view, row(/←.*\/\?token=a%20b~&x=%41\+/));
  });

  pageTest("talks to a plain echo, which selects no subprotocol", async () => {
    const view = await browseConnected("?protocol=", listen({ defaultSubprotocol: "echo" }));
    await enter(view, "Hello");
    await shows(view, row(/→Hello/), row(/←Hello/), `${rows(/ ms$/)} === 0`);
    await shows(view, status("no subprotocol"));
  });

  pageTest("stays red and explains when a server refuses the subprotocol", async () => {
    const view = await browse(`http://localhost:${listen()}/?protocol=unknown`);
    await shows(view, state("failed"), red, row(/No connection.*does not tell a page.*1006/));
    await shows(view, `!(${noError})`);
  });

  pageTest("opened as a file, it keeps what is typed while its server is lost", async () => {
    const server = startServer();
    const { port } = server;
    const { href } = new URL("index.html", import.meta.url);
    const view = await browse(href);
    await shows(view, `address.value === "ws://localhost:9000/"`);
    await view.navigate(`${href}?server=ws://localhost:${port}/`);
    await shows(view, state("connected"));
    await submit(view, `"Hello"`);
    await shows(view, green, row(/←olleH.* ms$/));
    await server.stop();
    await shows(view, state("lost"), red, row(/Connection lost.*code 10/));
    for (const text of ["meanwhile", "and again"]) await submit(view, `"${text}"`);
    await shows(view, notice("2 messages waiting"), `${rows(/→/)} === 1`);
    listen({ port });
    await shows(view, state("connected"), green, row(/Connected again/), notice(""));
    await shows(view, row(/→meanwhile/), row(/←elihwnaem/), row(/←niaga dna/));
  });

  // ---- Closing and connecting again

  pageTest("pauses before each new try for half to all of a time that doubles", async () => {
    const closingWith = (code: number) =>
      `ws://127.0.0.1:${listen({ subprotocols: { [NAME]: (socket) => socket.close(code) } })}/`;
    const doubling = [250, 500, 1000, 2000, 4000, 5000, 5000];
    const servers: [string, number[]][] = [
      ["ws://127.0.0.1:1/", doubling],
      [closingWith(1011), doubling],
      [closingWith(1013), [5000, 5000]],
    ];
    const view = await browseConnected();
    await view.evaluate(hurry);
    for (const [address, longest] of servers) {
      await view.evaluate("pauses = []");
      await use(view, "connect", { address });
      await shows(view, `pauses.length >= ${longest.length}`, red);
      const pauses = await view.evaluate("pauses") as number[];
      const parts = longest.map((milliseconds, index) => pauses[index] / milliseconds);
      assert.ok(parts.every((part) => part >= 0.5 && part <= 1), `${address} ${pauses}`);
      assert.ok(new Set(parts).size > 1, `${address}: the same part of each pause, ${pauses}`);
    }
  });

  pageTest("refuses a code that a page may not use, and a reason that is too long", async () => {
    const view = await browseConnected();
    for (const code of ["999", "1001", "2999", "5000", "", "x"]) {
      await use(view, "close", { code });
      await shows(view, includes("closeError", "1000"), state("connected"));
    }
    await use(view, "close", { code: "3000", reason: "é".repeat(62) });
    await shows(view, includes("closeError", "123"), state("connected"));
    await use(view, "close", { reason: `${"é".repeat(61)}x` });
    await shows(view, state("closed"), `${textOf("closeError")} === ""`);
  });

  pageTest("stays closed after Close while it tries, until Connect", async () => {
    const server = startServer();
    const { port } = server;
    const view = await browseConnected("", port);
    await server.stop();
    await shows(view, state("lost"), red);
    await use(view, "close", {});
    const again = startServer({ port });
    await shows(view, state("closed"), grey, row(/stopped trying/));
    await sleep(300); // the next try would come after 250 ms at most
    await shows(view, state("closed"));
    await view.evaluate(
      `connect.click(), document.getElementById("close").click(), connect.click()`,
    );
    await shows(view, state("connected"));
    await again.stop();
    await shows(view, state("lost"), red); // what was closed on purpose was the connection before
  });

  pageTest("says when no reply comes for 5 s, and waits for it in Times N", async () => {
    let arrived = 0;
    const port = listen({ subprotocols: { [NAME]: () => () => void arrived++ } });
    const view = await browseConnected("", port);
    await enter(view, "Hello");
    await shows(view, row(/→Hello/), notice(""));
    await view.evaluate(`performance.now = ((time) => () => time + 5001)(performance.now())`);
    await shows(view, notice("No reply for 5 s"), green);
    await runTimes(view, "Hello", 500);
    await sleep(100);
    assert.equal(arrived, 2);
  });

  pageTest("refuses a message while 64 MiB are waiting, and keeps it in the field", async () => {
    const view = await browse(`http://localhost:${listen()}/?server=ws://127.0.0.1:1/`);
    await submit(view, `"x".repeat(64 * 1024 * 1024 + 1)`);
    await shows(view, notice("1 message waiting"));
    await submit(view, `"one more"`);
    await shows(view, includes("error", "Too much is waiting"), "message.value === 'one more'");
    await shows(view, notice("1 message waiting"));
  });

  // ---- The header and the message field do not move

  for (const width of [320, 390, 900]) {
    pageTest(`keeps the message field in its place, ${width} pixels wide`, async () => {
      const server = startServer();
      const view = await browseConnected("", server.port);
      await view.resize(width, 600);
      await shows(view, `innerWidth === ${width}`);
      const tops = `${fieldTop} + " " + (tools.getBoundingClientRect().top + scrollY)`;
      const stays = `${tops} === "${await view.evaluate(tops)}"`;
      await submit(view, `"Hello"`);
      await shows(view, row(/←/), stays);
      await view.evaluate("hex.checked = true");
      await submit(view, `"xy"`);
      await shows(view, `${textOf("error")} !== ""`, stays);
      await view.evaluate("hex.checked = false");

      // While it tries again and again, it tells a screen reader the status once.
      await view.evaluate(hurry);
      await view.evaluate(`globalThis.statusChanges = 0, new MutationObserver(() => statusChanges++)
        .observe(document.getElementById("status"), { childList: true })`);
      await server.stop();
      await shows(view, state("lost"), red, "pauses.length >= 6", "statusChanges === 1", stays);
      await submit(view, `"meanwhile"`);
      await shows(view, notice("1 message waiting"), stays);

      await use(view, "connect", { address: "nonsense" });
      await shows(view, state("failed"), stays);
      const path = "long".repeat(100);
      await use(view, "connect", { address: `ws://127.0.0.1:${await listenSilently()}/${path}` });
      await shows(view, state("connecting"), stays);
      await use(view, "connect", { address: `ws://127.0.0.1:1/${path}` });
      await shows(
        view,
        state("failed"),
        row(/long.* does not tell a page which, code 1006/),
        stays,
      );
      await use(view, "close", {});
      await shows(view, state("closed"), stays);
      const top = await view.evaluate(fieldTop);
      await view.evaluate("message.value = 'one\\ntwo\\nthree'");
      await shows(view, `${fieldTop} === ${top}`, "message.offsetHeight > 60");
    });
  }

  pageTest("shows a usable message field in a small window, or with large text", async () => {
    const view = await browseConnected();
    const windows: [number, string][] = [[568, "200%"], [256, "100%"], [180, "100%"]];
    for (const [height, fontSize] of windows) {
      await view.resize(320, height);
      await view.evaluate(`document.documentElement.style.fontSize = "${fontSize}"`);
      await shows(view, `innerHeight === ${height}`, "message.offsetWidth > 200");
      await shows(view, "document.documentElement.scrollWidth <= 320", "scrollY === 0");
      await shows(view, "message.getBoundingClientRect().bottom < innerHeight");
    }
  });

  // ---- The message field

  pageTest("sends with Enter or Send, and starts a line with Shift+Enter", async () => {
    const view = await browseConnected("?protocol=echo");
    await view.type("one");
    await view.press("Enter", { modifiers: ["Shift"] });
    await view.type("two");
    await shows(view, "message.value === 'one\\ntwo'", `${rows(/→/)} === 0`);
    await view.press("Enter");
    await shows(view, row(/→one\\ntwo 7 bytes/), row(/←one\\ntwo/), "message.value === ''");
    await view.type("three");
    await view.click("#send");
    await shows(view, row(/←three/), "document.activeElement === message");
  });

  pageTest("sends once while Enter is held down, and never in a composition", async () => {
    const view = await browseConnected();
    await view.evaluate(`(() => {
      const press = (changes) => {
        const options = { key: "Enter", bubbles: true, cancelable: true, ...changes };
        return message.dispatchEvent(new KeyboardEvent("keydown", options));
      };
      message.value = "かな";
      globalThis.untouched = press({ isComposing: true });
      for (const repeat of [false, true, true]) press({ repeat });
    })()`);
    await shows(view, "untouched", row(/←なか/), `${rows(/→/)} === 1`);
  });

  pageTest("brings back what was sent with arrow-up, and goes on with arrow-down", async () => {
    const view = await browseConnected();
    for (const text of ["first", "one\ntwo", "third"]) await submit(view, JSON.stringify(text));
    await view.evaluate("message.focus()");
    const presses: [string, string][] = [
      ["ArrowUp", "third"],
      ["ArrowUp", "one\ntwo"],
      ["ArrowUp", "one\ntwo"], // the caret moves from its second line to its first
      ["ArrowUp", "first"],
      ["ArrowUp", "first"],
      ["ArrowDown", "one\ntwo"],
      ["ArrowDown", "third"],
      ["ArrowDown", ""],
    ];
    for (const [key, text] of presses) {
      await view.press(key);
      await shows(view, `message.value === ${JSON.stringify(text)}`);
    }
    await view.type("typed");
    await view.press("ArrowUp");
    await shows(view, "message.value === 'typed'");
  });

  pageTest("takes hex bytes in the usual spellings, and says what is no byte", async () => {
    const view = await browseConnected("?protocol=echo");
    await view.click("#hex");
    const spellings = ["01 02fF", "0102FF", "0x01, 0x02, 0xff", "0x1,0x2,0xff", "01:02:ff"];
    spellings.push("01-02-FF", "01,02,ff", "\\x01\\x02\\xff", "0x0102ff");
    for (const spelling of spellings) await submit(view, JSON.stringify(spelling));
    await shows(view, `${rows(/←01 02 ff 3 bytes/)} === ${spellings.length}`);
    await view.evaluate("log.replaceChildren()");
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

  // ---- On the wire

  pageTest("shows the last frame of each direction, and what its header costs", async () => {
    const view = await browseConnected("?protocol=echo");
    const frames: [string, string, string, number][] = [
      [`""`, "81 80 mm mm mm mm", "81 00", 6],
      [`"Hello"`, "81 85 mm mm mm mm …", "81 05 48 65 6c 6c 6f", 6],
      [`"x".repeat(125)`, "81 fd mm mm mm mm …", "81 7d 78", 6],
      [`"x".repeat(126)`, "81 fe 00 7e mm mm mm mm …", "81 7e 00 7e 78", 8],
      [`"x".repeat(65535)`, "81 fe ff ff mm mm mm mm …", "81 7e ff ff 78", 8],
      [`"x".repeat(65536)`, "81 ff 00 00 00 00 00 01 00 00 mm", "81 7f 00 00 00 00 00 01", 14],
      [`"00 01", hex.checked = true`, "82 82 mm mm mm mm …", "82 02 00 01", 6],
    ];
    for (const [message, sent, received, header] of frames) {
      await submit(view, message);
      await shows(view, includes("sentFrame", sent), includes("receivedFrame", received));
      await shows(view, includes("sentFrame", `The header costs ${header} bytes`));
      await shows(view, includes("receivedFrame", `The header costs ${header - 4} bytes`));
    }
    await shows(view, includes("sentFrame", "8 bytes travel for a message of 2"));
    await shows(view, includes("wire", "cannot know the mask key"), includes("wire", "fragments"));
    for (const host of ["developer.mozilla.org", "www.rfc-editor.org"]) {
      await shows(view, `wire.querySelector('a[href*="//${host}/"][rel=noreferrer]') !== null`);
    }
  });

  // ---- Times N

  pageTest("sends a message N times, shows them in one row, keeps to its policy", async () => {
    const view = await browseConnected();
    await view.evaluate(`new ReportingObserver((reports) => globalThis.violations = reports, {
      types: ["csp-violation"],
      buffered: true,
    }).observe()`);
    await submit(view, `"x".repeat(1000)`);
    await shows(view, row(/←/));
    await open(view);
    await runTimes(view, "Hello", 500);
    const titles = ["total", "median", "99th percentile", "longest"];
    const figures = titles.map((title) => `${title} [\\d.,]+ ms`).join(", ");
    await shows(view, row(new RegExp(`Times 500, 5 bytes: ${figures}`)), `${opened} !== null`);
    await shows(view, "log.querySelectorAll('svg path').length === 1", "log.children.length === 4");
    await shows(view, "run.textContent === 'Send N times'", "globalThis.violations === undefined");
  });

  pageTest("computes the figures of Times N from the round trips of its plot", async () => {
    const view = await browseConnected();
    await runTimes(view, "Hello", 150);
    await shows(view, row(/Times 150/));
    const text = await view.evaluate("log.lastElementChild.textContent") as string;
    const figure = (name: string) => Number(text.match(`${name} ([\\d.]+) ms`)![1]);
    const shape = await view.evaluate("log.querySelector('path').getAttribute('d')") as string;
    const depths = [...shape.matchAll(/V([\d.]+)H/g)].map(([, depth]) => Number(depth));
    const roundTrips = depths.map((depth) => (100 - depth) / 100 * figure("longest"));
    const sorted = roundTrips.toSorted((a, b) => a - b);
    assert.equal(sorted.length, 150);
    assert.ok(Math.abs(figure("median") - sorted[74]) < 0.11, text);
    assert.ok(Math.abs(figure("99th percentile") - sorted[148]) < 0.11, text);
    const sum = roundTrips.reduce((sum, time) => sum + time);
    assert.ok(sum <= figure("total") + 150 * 0.05, `${sum} ms of round trips, ${text}`);
  });

  pageTest("measures the last message or the placeholder if the field is empty", async () => {
    const view = await browseConnected();
    await runTimes(view, "", 3);
    await shows(view, row(/Times 3, 13 bytes: total/), includes("receivedFrame", "81 0d 21 64 6c"));
    await submit(view, `"another"`);
    await runTimes(view, "", 4);
    await shows(view, row(/Times 4, 7 bytes: total/), `${rows(/→another/)} === 1`);
    await submit(view, `""`);
    await runTimes(view, "", 5);
    await shows(view, row(/Times 5, 13 bytes: total/), "message.value === ''");
  });

  pageTest("ends Times N with Stop or with the connection, and shows its row", async () => {
    const server = startServer();
    const view = await browseConnected("?protocol=echo", server.port);
    await runTimes(view, "Hello", 100_000);
    await shows(view, "run.textContent === 'Stop'", "progress.value > 100");
    await view.click("#run");
    await shows(view, row(/Times 100,000, stopped after [\d,]+, 5 bytes: total/));
    await submit(view, `"afterwards"`);
    await shows(view, row(/←afterwards.* ms/), `${rows(/[→←]/)} === 2`);
    await runTimes(view, "Hello", 99_999);
    await shows(view, "progress.value > 100");
    await server.stop();
    await shows(view, row(/Times 99,999, stopped/), row(/Connection lost/), "run.disabled");
  });

  pageTest("offers Times N only where a reply belongs to a message", async () => {
    const view = await browseConnected();
    for (const name of [NAME, "echo", "count", "chat", "on-demand"]) {
      await use(view, "connect", { protocol: name });
      await shows(view, state("connected"), status(name));
      await shows(view, `run.disabled === ${![NAME, "echo"].includes(name)}`);
    }
  });

  // ---- The document

  pageTest("has a language, a heading, a label for each field, and closed tools", async () => {
    const view = await browseConnected();
    await shows(view, `document.documentElement.lang === "en"`, `document.querySelector("h1")`);
    const fields = "[...document.querySelectorAll('input, textarea')]";
    await shows(view, `${fields}.every((field) => field.labels.length === 1)`);
    await shows(view, "!connection.open", "!wire.open", "!times.open");
  });

  for (const scheme of ["light", "dark"]) {
    pageTest(`fits windows of 320 to 1600 pixels, in ${scheme} with enough contrast`, async () => {
      const view = await browseConnected("?protocol=on-demand");
      await view.cdp("Emulation.setEmulatedMedia", {
        features: [{ name: "prefers-color-scheme", value: scheme }],
      });
      await view.evaluate("connection.open = wire.open = times.open = true");
      await submit(view, `"close 4001 bye"`);
      await shows(view, row(/Connection lost/), row(/Connected again/));
      await use(view, "connect", { protocol: "echo" });
      await shows(view, state("connected"), status("echo"));
      for (const text of [`"a\\tb"`, `"y".repeat(100_001)`]) await submit(view, text);
      await runTimes(view, "Hello", 10);
      await shows(view, row(/Times 10/), row(/←yyy/));
      await view.evaluate(`log.querySelectorAll("details").forEach((row) => row.open = true)`);
      await submit(view, `"xy", hex.checked = true`);
      await shows(view, logged("1 character more"), includes("error", "xy"));
      await shows(view, `matchMedia("(prefers-color-scheme: ${scheme})").matches`);
      const texts = "[...log.querySelectorAll('bdi:not(summary *), summary, small, svg')]";
      for (const width of [320, 390, 900, 1600]) {
        await view.resize(width, 700);
        await shows(view, `innerWidth === ${width}`);
        const isInside = `(text) => text.getBoundingClientRect().right < ${width}`;
        await shows(view, `${texts}.every(${isInside})`);
        await shows(view, `document.documentElement.scrollWidth <= ${width}`);
        assert.deepEqual(await view.evaluate(lowContrasts), []);
      }
    });
  }

  // ---- With a server on each runtime

  pageTestOnRuntimes(
    "is green, and shows a message and its reply in one row each",
    async (start) => {
      const port = await start().port();
      const view = await browseConnected("", port);
      await shows(view, green, status(`ws://localhost:${port}/`), status(NAME));
      await shows(view, row(/Connected to ws:/), "document.activeElement === message");
      await enter(view, "Hello, world!");
      await shows(view, row(/→Hello, world! 13 bytes \d\d:\d\d:\d\d\.\d{3} $/));
      await shows(view, row(/←!dlrow ,olleH 13 bytes \d\d:\d\d:\d\d\.\d{3} in [\d.]+ ms$/));
      await shows(view, `${rows(/[→←]/)} === 2`);
    },
  );

  pageTestOnRuntimes("finds its server under any path, and over TLS", async (start) => {
    const proxy = await listenUnderPath("/under/a/path/", await start().port());
    const tls = await start(...certificate()).port();
    for (const place of [`://localhost:${proxy}/under/a/path/`, `s://localhost:${tls}/`]) {
      const view = await browse(`http${place}`);
      await shows(view, state("connected"), status(`ws${place}`));
      await enter(view, "Hello");
      await shows(view, row(/←olleH/));
    }
  });

  pageTestOnRuntimes("stays closed after Close, and after a server's clean 1000", async (start) => {
    const view = await browseConnected("?protocol=on-demand", await start().port());
    await view.evaluate(hurry);
    await use(view, "close", { code: "4001", reason: "bye" });
    await shows(view, state("closed"), grey, row(/This page closed.*4001, “bye”\. \d/));
    await sleep(100); // several tries would come in this time
    await use(view, "connect", {});
    await shows(view, state("connected"), green, "pauses.length === 0");
    await submit(view, `"close 1000 bye"`);
    await shows(view, state("closed"), grey, row(/The server closed.*1000.*bye/));
    await sleep(100);
    await shows(view, state("closed"), "pauses.length === 0", noError);
  });

  pageTestOnRuntimes(
    "explains another code, or a message too big, and connects again",
    async (start) => {
      const view = await browseConnected("?protocol=on-demand", await start().port());
      await enter(view, "close 4001 bye");
      await shows(view, row(/Connection lost.*4001.*bye/), row(/Connected again/), green);
      await use(view, "connect", { protocol: NAME });
      await shows(view, status(NAME));
      await submit(view, `"x".repeat(1024 * 1024 + 1)`);
      await shows(view, row(/Connection lost.*(1009|1006).*Messages without a reply: 1/));
      await shows(view, `${rows(/Connected again/)} === 2`, state("connected"));
      await shows(view, "log.querySelectorAll('.error').length === 2");
      await use(view, "close", {});
      await shows(view, row(/This page closed the connection: code 1000\. \d/)); // no reply is due
    },
  );

  pageTestOnRuntimes("survives 10,000 messages at once, and keeps 200 rows", async (start) => {
    const view = await browseConnected("?protocol=on-demand", await start().port());
    await submit(view, `"repeat 10000 hello"`);
    await submit(view, `"delay 1 afterwards"`);
    await shows(view, row(/←afterwards/), green);
    await shows(view, "log.children.length === 200", `${rows(/←hello/)} > 100`);
  });
});

/** The texts of the page whose contrast with what is behind them is under 4.5 (WCAG 1.4.3). */
const lowContrasts = `(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = channels(color).map((value) => value / 255)
      .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return channels(color)[3] === 0 ? behind(element.parentElement) : color;
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
// Each code block of README.md is run as it stands there, in a copy of the project that has what
// README says to save or to add. Only the ports are replaced: 9000 by that of a server that the test
// has started, 9001 by a free one. What a block prints or answers is the `text` block after it, or
// comments in it ("prints ...", "answers hello with ..."). A block that cannot be run stands below a
// comment that readers do not see: <!-- Not run: REASON -->

type Block = {
  language: string;
  code: string;
  /** What README says that it prints or answers; "" if README does not say it. */
  output: string;
  /** The paragraph above it. */
  introduction: string;
  heading: string;
  line: number;
};

const readme = readFileSync(join(here, "README.md"), "utf8");
// A block and, in the same section, before any other block, its output.
const fencedBlock = /^```(.*)\n([^]*?)^```$(?:(?:\n(?! *[`~]{3}|#).*)*\n```text\n([^]*?)^```$)?/gm;
const blocks = [...readme.matchAll(fencedBlock)].map(
  ({ 1: language, 2: code, 3: outputText, index }): Block => {
    const textBefore = readme.slice(0, index);
    const comments = code.matchAll(/ (?:\/\/|#) (?:prints|answers hello with) (.*\n)/g);
    return {
      language,
      code,
      output: outputText ?? [...comments].map(([, output]) => output).join(""),
      introduction: textBefore.split("\n\n").at(-2)!,
      heading: textBefore.match(/(?<=^#+ ).*$/gm)!.at(-1)!,
      line: textBefore.split("\n").length,
    };
  },
);

const isNotRun = ({ introduction }: Block) => /^<!-- Not run: [^>]+ -->$/.test(introduction);
const isShell = ({ language }: Block) => language === "sh";
const isTest = ({ introduction }: Block) => introduction.includes("end of `server_test.ts`");
const isSubprotocol = ({ code }: Block) => /^"\w+": /.test(code);
const runsTests = (block: Block) => isShell(block) && block.code.includes("server_test.ts");

/** The name of the file that a block is to be saved as. */
const fileName = ({ introduction }: Block) => introduction.match(/Save it\s+as\s+`([^`]+)`/)?.[1];

/** The commands of a block, or those that run its file, without those of the other runtime. */
function commandsOf(block: Block): string[] {
  const name = fileName(block);
  const commands = name
    ? readme.match(/(?<=`)[^`]+(?=`)/g)!.filter((text) => text.endsWith(` ${name}`))
    : block.code.trimEnd().split("\n");
  const otherRuntime = onDeno ? "bun " : "deno ";
  return commands.filter((command) => !command.startsWith(otherRuntime));
}

/** Copies the project with what README says to save or to add, and with another port than 9001. */
function copyProject(port: number): string {
  const files: Record<string, string> = { "README.md": readme };
  for (const name of ["server.ts", "server_test.ts"]) {
    files[name] = readFileSync(join(here, name), "utf8");
  }
  const table = "export const subprotocols: Record<string, Subprotocol> = {\n";
  for (const block of blocks) {
    const { code } = block;
    const name = fileName(block);
    if (name) files[name] = code.replaceAll("9001", `${port}`);
    // What is there already was added by somebody who has followed README.
    if (isTest(block)) files["server_test.ts"] = files["server_test.ts"].replace(code, "") + code;
    if (isSubprotocol(block)) {
      files["server.ts"] = files["server.ts"].replace(code, "").replace(table, table + code);
    }
  }
  return copyServer(files);
}

/** Runs a command in a shell. Its processes are a group, so that all of them end after the test. */
function runCommand(command: string, folder: string): Program {
  const env = { PORT: "0", PATH: `${process.env.PATH}:/usr/sbin` }; // Debian's place for nginx
  const program = new Program("sh", ["-c", command], env, { cwd: folder, detached: true });
  cleanups.push(() => spawnSync("sh", ["-c", `kill -KILL -${program.child.pid}`]));
  return program;
}

/** Leaves out of a list the subprotocols that the table in README does not have, such as "shout". */
function withoutAddedNames(text: string): string {
  const isAdded = (name: string) => !readme.includes(`\n| \`${name}\``);
  const addedNames = ["shout", ...Object.keys(subprotocols)].filter(isAdded);
  const remove = (rest: string, name: string) =>
    rest.replace(`, ${name}`, "").replace(`${name}, `, "");
  return addedNames.reduce(remove, text);
}

/** Waits until a program has printed what README says, whatever the ports. */
async function assertPrints(program: Program, { output }: Block): Promise<void> {
  const withoutPorts = (text: string) => text.replace(/(localhost|127\.0\.0\.1):\d+/g, "$1");
  await eventually(() => {
    const printed = withoutAddedNames(withoutPorts(program.out));
    assert.equal(printed, withoutPorts(output), program.err || undefined);
  }, "it prints what README says");
}

/** Connects a client by WebSocket, and fails unless it gets a message reversed. */
async function assertReverses(client: RawClient, path: string): Promise<void> {
  client.socket.write(handshake({}, `GET ${path} HTTP/1.1`));
  assert.equal((await client.nextResponse())?.status, 101);
  assert.equal(await client.ask("Hello, world!"), "!dlrow ,olleH");
}

/** Runs the commands of a block. Talks to the servers that they start. */
async function runCommands(block: Block, folder: string): Promise<void> {
  for (const command of commandsOf(block)) {
    const program = runCommand(command.replace(" server.ts", " server.ts --port 0"), folder);
    const findUrl = () => program.out.match(/(\w+):\/\/localhost:(\d+)\/$/m) ?? undefined;
    const url = await until(program.child.stdout!, findUrl);
    if (url) {
      const port = Number(url[2]);
      const ca = url[1] === "https" && readFileSync(join(folder, "cert.pem"));
      const client = ca
        ? new RawClient(connectTls({ port, host: "127.0.0.1", servername: "localhost", ca }))
        : RawClient.to(port);
      await assertReverses(client, "/");
    } else {
      assert.equal(await program.exitStatus(), 0, program.out + program.err);
    }
    if (block.output) await assertPrints(program, block);
    if (runsTests(block)) assert.match(program.out + program.err, /\b1 pass/);
  }
}

/** Starts nginx with a `server` block that holds README's, and talks through it. */
async function tryNginx(location: string, port: number, folder: string): Promise<void> {
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
  const nginx = runCommand(`nginx -p ${folder} -c nginx.conf -e stderr`, folder);
  await eventually(async () => {
    const response = await request(port, "GET /echo/ HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert.equal(response.status, 200, nginx.err);
  }, "nginx serves the page");
  await assertReverses(RawClient.to(port), "/echo/");
  assert.ok(limits.idleSeconds / 2 < 60, "the server pings before nginx ends the connection");
}

/** Runs a block in the way that its language and the paragraph above it tell. */
async function runBlock(block: Block): Promise<void> {
  const { port, stop } = startServer();
  await stop(); // now this port is free
  const folder = copyProject(port);
  const code = block.code.replaceAll(":9000", `:${listen()}`).replaceAll("9001", `${port}`);
  if (isTest(block)) return assert.ok(blocks.some(runsTests), "a command runs it");
  if (fileName(block)) {
    assert.notEqual(commandsOf(block).length, 0, "README says how to run the file");
    return runCommands(block, folder);
  }
  if (isShell(block)) {
    if (code.includes("--cert ")) {
      const makeCertificate = blocks.find(({ code }) => code.startsWith("openssl "))!;
      await runCommands(makeCertificate, folder);
    }
    return runCommands({ ...block, code }, folder);
  }
  if (block.language === "nginx") return tryNginx(code, port, folder);

  assert.notEqual(block.output, "", "README says what it prints, or has <!-- Not run: REASON -->");
  if (isSubprotocol(block)) {
    const server = startProgram(["--port", "0"], {}, join(folder, "server.ts"));
    const client = await RawClient.open(await server.port(), code.match(/^"(\w+)"/)![1]);
    return assert.equal(`${await client.ask("hello")}\n`, block.output);
  }
  const program = join(folder, "program");
  writeFileSync(program, code);
  if (block.language === "python") {
    return assertPrints(new Program("/usr/bin/python3", [program]), block);
  }
  if (block.language === "js") {
    if (code.includes(`:${port}`)) await startProgram([], {}, join(folder, "idea.ts")).prints(/:/);
    return assertPrints(startProgram([], {}, program), block);
  }
  assert.fail(`no test knows how to run a block of "${block.language}"`);
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
  if (/openssl|--cert/.test(block.code)) return withoutOpenssl;
  const [command] = commandsOf(block);
  if (command === undefined) return `the tests on ${onDeno ? "Bun" : "Deno"} run it`;
  const [tool] = command.split(" ");
  // On a computer where the runtimes are installed, npx would download them a second time.
  const isUnderNpx = process.env.npm_command === "exec";
  if (tool === "npx" && !isUnderNpx && !process.env.CI) {
    return "these tests were not started with npx";
  }
  return without(tool, isInstalled(`command -v ${tool}`));
}

describe("the README", () => {
  for (const block of blocks.filter((block) => !isNotRun(block))) {
    const { heading, language, line } = block;
    const name = `"${heading}", line ${line}: the ${language} block works`;
    test(name, () => runBlock(block), reasonToSkip(block));
  }

  test("each code block of README.md is one that these tests find", () => {
    assert.doesNotMatch(readme.replace(fencedBlock, ""), /^\s*(```|~~~)/m);
  });

  const curl = blocks.find(({ code }) => code.startsWith("curl "))!;
  test("the curl command is refused for nothing but its subprotocol", async () => {
    const command = curl.code
      .replace("curl", "curl --verbose")
      .replace(":9000", `:${listen()}`)
      .replace("unknown", NAME);
    await runCommand(command, here).reports(/^< HTTP\/1.1 101 /m);
  }, reasonToSkip(curl));

  test("each command can be pasted into zsh: no comments, no unquoted patterns", () => {
    for (const { code, line } of blocks.filter(isShell)) {
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
