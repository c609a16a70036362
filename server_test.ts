/**
 * Tests of server.ts and index.html, for `deno test -A` and `bun test` alike. Each runtime tests
 * the server as it runs there, over real sockets on free ports.
 */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { type ChildProcess, execFileSync, spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { appendFileSync, cpSync, existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { connect as connectHttp2 } from "node:http2";
import { type AddressInfo, connect as connectTcp, createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import type { Readable } from "node:stream";
import { afterEach, describe, it } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { connect as connectTls } from "node:tls";
import { type Connection, limits, type Message, reverse, serve, subprotocols } from "./server.ts";

const NAME = "dumb-increment-protocol";
const here = import.meta.dirname!;
const onDeno = "Deno" in globalThis;
const page = readFileSync(join(here, "index.html"), "utf8");

// What the tests change is put back, and what they start is ended, after each of them.
const usualLimits = { ...limits }, usualSubprotocols = { ...subprotocols };
const cleanups: (() => unknown)[] = [];

afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
  Object.assign(limits, usualLimits);
  for (const name of Object.keys(subprotocols)) delete subprotocols[name];
  Object.assign(subprotocols, usualSubprotocols);
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
function listen(options: Parameters<typeof serve>[0] = {}): number {
  const server = serve({ port: 0, hostname: "127.0.0.1", quiet: true, ...options });
  cleanups.push(server.stop);
  return server.port;
}

/** A server started from the command line. */
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

  /** Not `child.kill`: on Deno the exit status would not be seen then. */
  signal(name: "SIGINT" | "SIGTERM"): void {
    process.kill(this.child.pid!, name);
  }

  /** Waits for its end and gives its exit status. */
  end(): Promise<number | null> {
    return this.#end;
  }
}

const denoArgs = ["run", "--no-prompt", "--allow-net", "--allow-read", "--allow-env=PORT"];
const runtimeArgs = onDeno ? denoArgs : [];

function start(args: string[], env?: Record<string, string>, file = join(here, "server.ts")) {
  return new Program(process.execPath, [...runtimeArgs, file, ...args], env);
}

/** Starts a copy of server.ts with lines added to it, as somebody makes it their own. */
function startEdited(lines: string): Program {
  const folder = temporaryFolder();
  for (const file of ["server.ts", "index.html", "deno.json"]) {
    cpSync(join(here, file), join(folder, file));
  }
  appendFileSync(join(folder, "server.ts"), lines);
  return start(["--port", "0"], {}, join(folder, "server.ts"));
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

type Answer = { status: number; body: string; header(name: string): string[] };
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
    assert.equal((await raw.answer())?.status, 101);
    return raw;
  }

  /** The next response; undefined at the end of the connection. */
  answer(method = "GET"): Promise<Answer | undefined> {
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
  frame(): Promise<Frame | undefined> {
    return until(this.socket, () => this.#frame());
  }

  #frame(): Frame | undefined {
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
    this.socket.write(frame(typeof message === "string" ? TEXT : BINARY, message));
    const reply = await this.frame();
    return reply && reply.data.toString(reply.opcode === TEXT ? "utf8" : "hex");
  }

  /** Reads to the end of the connection: code and reason of the close frame, or "cut". */
  async end(): Promise<string> {
    const close = await until(this.socket, () => {
      for (let frame; (frame = this.#frame());) if (frame.opcode === CLOSE) return frame.data;
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
function frame(opcode: number, payload: string | Uint8Array = "", fin = true): Buffer {
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
  return frame(CLOSE, Uint8Array.of(code >> 8, code & 255));
}

/** Sends a request and gives the response. */
async function request(port: number, text: string): Promise<Answer> {
  const raw = Raw.to(port);
  raw.socket.write(text, "latin1");
  const answer = await raw.answer(text.split(" ")[0]);
  raw.socket.destroy();
  return answer ?? assert.fail("no answer");
}

/** A client as an application has one. */
async function connect(port: number): Promise<WebSocket> {
  const socket = new WebSocket(`ws://127.0.0.1:${port}/`, NAME);
  cleanups.push(() => socket.close());
  socket.binaryType = "arraybuffer";
  await once(socket, "open");
  return socket;
}

/** Sends messages all at once and gives as many replies. */
function replies(socket: WebSocket, messages: Message[]): Promise<(string | ArrayBuffer)[]> {
  return new Promise((resolve, reject) => {
    const received: (string | ArrayBuffer)[] = [];
    socket.onmessage = ({ data }) => received.push(data) === messages.length && resolve(received);
    socket.onclose = ({ code }) => reject(new Error(`closed (${code})`));
    for (const message of messages) socket.send(message);
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

  test("HEAD / has the headers of the page and no body", async () => {
    const raw = Raw.to(listen());
    raw.socket.write("HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    const answer = await raw.answer("HEAD");
    assert.equal(answer?.status, 200);
    assert.deepEqual(answer.header("content-type"), ["text/html; charset=utf-8"]);
    assert.equal(answer.header("content-security-policy").length, 1);
    assert.equal(await raw.frame(), undefined, "nothing follows");
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
      const program = start(["--port", "0", "--quiet"]);
      const port = await program.port(), raw = Raw.to(port);
      raw.socket.write(Buffer.from(handshake({ [name]: "\xa0Upgrade, \xa0websocket" }), "latin1"));
      assert.equal((await raw.answer())?.status, 400);
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
      assert.equal((await raw.answer())?.status, 426);
      raw.socket.write(`${method} / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n`);
      assert.equal((await raw.answer())?.status, status);
    });
  }
});

// ---- Subprotocols -------------------------------------------------------------------------------

describe("subprotocols", () => {
  const selected: Record<string, [string | string[], string]> = {
    "the only one": [NAME, NAME],
    "the second of two": [`other, ${NAME}`, NAME],
    "one without blanks": [`a,${NAME},b`, NAME],
    "one with blanks and tabs": [`a ,\t ${NAME} \t, b`, NAME],
    "one beside empty items": [`,, ${NAME},`, NAME],
    "one on the second line": [["a, b", `c, ${NAME}`], NAME],
    "the first of two that are spoken": [`a, shout, ${NAME}`, "shout"],
    "the first of two on two lines": [[NAME, "shout"], NAME],
  };
  for (const [what, [offer, name]] of Object.entries(selected)) {
    test(`${what} is selected, and named once`, async () => {
      subprotocols.shout = (message) => String(message).toUpperCase();
      const answer = await request(listen(), handshake({ "Sec-WebSocket-Protocol": offer }));
      assert.equal(answer.status, 101);
      assert.deepEqual(answer.header("sec-websocket-protocol"), [name]);
    });
  }

  const strange = ["__proto__", "constructor", "toString", "hasOwnProperty"];
  const alike = [NAME.toUpperCase(), `${NAME}s`, `"${NAME}"`, `${NAME}\xa0`, `x,\xa0${NAME}`];
  const wrong = [[], "", ",", "other", ...alike, ...strange];
  for (const offer of wrong) {
    test(`${JSON.stringify(offer)} is answered with 400 and the ones spoken`, async () => {
      subprotocols.shout = (message) => message;
      const answer = await request(listen(), handshake({ "Sec-WebSocket-Protocol": offer }));
      assert.equal(answer.status, 400);
      assert.match(answer.body, new RegExp(`${NAME}.*shout`));
      assert.deepEqual(answer.header("content-type"), ["text/plain; charset=utf-8"]);
    });
  }

  test("that tests add work on one port, each connection for itself", async () => {
    const ended = Promise.withResolvers<void>();
    subprotocols.shout = (message) => `${message}!`.toUpperCase();
    subprotocols.silent = () => {};
    subprotocols.count = {
      open(connection: Connection) {
        let n = 0;
        const timer = setInterval(() => connection.send(`${n++}`), 5);
        const close = () => {
          clearInterval(timer);
          ended.resolve();
        };
        return { message: () => void (n = 100), close };
      },
    };
    const port = listen();
    const [reversing, shouting, counting, other] = await Promise.all(
      [NAME, "shout", "count", "count"].map((name) => Raw.open(port, name)),
    );
    const count = async (raw: Raw) => Number((await raw.frame())?.data);
    assert.deepEqual([await count(counting), await count(counting)], [0, 1]);
    assert.equal(await shouting.ask("hello"), "HELLO!");
    assert.equal(await reversing.ask("hello"), "olleh");
    counting.socket.write(frame(TEXT, "go on from 100"));
    let n = 1;
    for (let last = n; n === last || n === last + 1; n = await count(counting)) last = n;
    assert.equal(n, 100);
    assert.equal(await count(other), 0, "it counts for itself");
    other.socket.write(frame(CLOSE));
    await ended.promise;
    assert.ok(await count(counting) > 100, "the other one counts on");

    const silent = await Raw.open(port, "silent");
    silent.socket.write(Buffer.concat([frame(TEXT, "no reply"), frame(PING, "alive")]));
    assert.equal((await silent.frame())?.opcode, PONG);
  });

  test("may speak first and close, and hear of the end once", async () => {
    let ends = 0;
    const ended = Promise.withResolvers<void>();
    subprotocols.farewell = {
      open(connection) {
        connection.send("hello");
        connection.send(Uint8Array.of(1, 2));
        const message = () => {
          connection.close(4000, "that is all");
          connection.send("too late");
        };
        return { message, close: () => void (ends++, ended.resolve()) };
      },
    };
    const raw = await Raw.open(listen(), "farewell");
    assert.equal(`${(await raw.frame())?.data}`, "hello");
    assert.deepEqual([...(await raw.frame())!.data], [1, 2]);
    raw.socket.write(frame(TEXT, "bye"));
    assert.equal(await raw.end(), "4000 that is all");
    raw.socket.write(closeFrame(4000));
    await ended.promise;
    await once(raw.socket, "close");
    assert.equal(ends, 1);
  });

  test("may close in open, and hear of that end, too", async () => {
    let ends = 0;
    subprotocols.closed = {
      open(connection) {
        connection.close(4001, "not today");
        return { close: () => void ends++ };
      },
    };
    assert.equal(await (await Raw.open(listen(), "closed")).end(), "4001 not today");
    assert.equal(ends, 1);
  });

  test("hear of no message after they have closed", async () => {
    let calls = 0;
    subprotocols.once = {
      open: (connection) => ({ message: () => (calls++, connection.close()) }),
    };
    const raw = await Raw.open(listen(), "once");
    raw.socket.write(Buffer.concat(Array(100).fill(frame(TEXT, "x"))));
    await raw.end();
    assert.equal(calls, 1);
  });
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
      raw.socket.write(frame(opcode));
      assert.deepEqual(await raw.frame(), { fin: true, opcode, data: Buffer.alloc(0) });
    }
  });

  for (const [opcode, reply] of [[TEXT, "zéyx"], [BINARY, "7aa9c37978"]] as const) {
    test(`in fragments with a ping between are one message (opcode ${opcode})`, async () => {
      const raw = await Raw.open(listen());
      raw.socket.write(frame(opcode, "x", false));
      raw.socket.write(frame(CONTINUATION, Buffer.from("yé").subarray(0, 2), false));
      raw.socket.write(frame(PING, "alive?"));
      const pong = await raw.frame();
      assert.deepEqual([pong?.opcode, `${pong?.data}`], [PONG, "alive?"]);
      raw.socket.write(frame(CONTINUATION, "", false));
      raw.socket.write(frame(CONTINUATION, Buffer.from("éz").subarray(1), true));
      const { data, opcode: kind } = (await raw.frame())!;
      assert.deepEqual([kind, data.toString(opcode === TEXT ? "utf8" : "hex")], [opcode, reply]);
    });
  }

  test("31,000 one after the other, and as many empty ones on Bun, are all answered", async () => {
    const raw = await Raw.open(await start(["--port", "0", "--quiet"]).port());
    for (let i = 0; i < 31_000; i++) assert.equal(await raw.ask("abc"), "cba", `the ${i}th`);
    for (let i = 0; i < (onDeno ? 0 : 31_000); i++) {
      assert.equal(await raw.ask(""), "", `the ${i}th`);
    }
  });

  test("1,000 at once are answered in order", async () => {
    const messages = Array.from({ length: 1000 }, (_, n) => `message ${n}`);
    const expected = messages.map((message) => reverse(message));
    assert.deepEqual(await replies(await connect(listen()), messages), expected);
  });

  test("20,000 at once, to a client that reads, lose none", async () => {
    const messages = Array.from({ length: 20_000 }, (_, n) => `${n}`);
    const port = await start(["--port", "0", "--quiet"]).port();
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
    raw.socket.write(frame(PING, "p".repeat(125)));
    const { opcode, data } = (await raw.frame())!;
    assert.deepEqual([opcode, `${data}`], [PONG, "p".repeat(125)]);
  });

  test("a close is answered with its code, and ends the connection", async () => {
    const raw = await Raw.open(listen());
    raw.socket.write(closeFrame(1000));
    assert.match(await raw.end(), /^1000 /);
    await until(raw.socket, () => undefined);
  });
});

// ---- Console and options ------------------------------------------------------------------------

describe("the console", () => {
  test("tells of connections, messages and replies", async () => {
    const program = start(["--port", "0"]);
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
    const program = start(["--port", "0"]);
    const raw = await Raw.open(await program.port());
    raw.socket.resetAndDestroy();
    await program.prints(/^closed: 127\.0\.0\.1:\d+, code 1006$/m);
  });

  test("shows controls of client text escaped, and 80 characters at most", async () => {
    const program = start(["--port", "0"]);
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
    const program = start(["--port", "0"]);
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
    const program = start(["--port", "0", "--quiet"]);
    const port = await program.port();
    await assertServes(port);
    program.signal("SIGTERM");
    assert.equal(await program.end(), 0);
    assert.equal(program.out, `Listening on http://localhost:${port}/\n`);
    assert.equal(program.err, "");
  });

  test("may be left unread: the server goes on, and stops when told", async () => {
    const { port, stop } = serve({ port: 0, quiet: true });
    await stop(); // so the port is free
    const unread = 'mkfifo "$0" && exec 3<>"$0" && exec "$@" >"$0"';
    const command = [
      process.execPath,
      ...runtimeArgs,
      join(here, "server.ts"),
      "--port",
      `${port}`,
    ];
    const program = new Program("sh", ["-c", unread, join(temporaryFolder(), "pipe"), ...command]);
    let raw: Raw | void = undefined;
    while (!raw) raw = await Raw.open(port).catch(() => sleep(50));
    for (let i = 0; i < 2000; i++) {
      assert.equal(
        await raw.ask(`${i}`.padEnd(70)),
        `${i}`.padEnd(70).split("").reverse().join(""),
      );
    }
    program.signal("SIGTERM");
    assert.equal(await program.end(), 0);
  });
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
      const program = start(args, env);
      assert.equal(await program.end(), 1);
      assert.equal(program.out, "");
      assert.match(program.err, /^Cannot start: [^\n]+\n$/);
      assert.match(program.err, words);
    });
  }

  test("a port in use is named in one line", async () => {
    const port = listen({ hostname: "0.0.0.0" });
    const program = start(["--port", `${port}`]);
    await assert.rejects(program.port());
    assert.equal(await program.end(), 1);
    assert.match(program.err, /^Cannot start: the port is in use, [^\n]*--port[^\n]*\n$/);
  });

  test("the port may come from PORT; --port comes first, empty is the same as none", async () => {
    const programs = [start([], { PORT: "0" }), start(["--port", "0"], { PORT: "1" })];
    for (const program of programs) await assertServes(await program.port());
  });

  test("--hostname is where it listens, and what it says", async () => {
    const program = start(["--port", "0", "--hostname", "127.0.0.1"]);
    const port = await program.port();
    assert.equal(program.out, `Listening on http://127.0.0.1:${port}/\n`);
    await assertServes(port);
  });

  test("--help explains each option, whatever stands beside it", async () => {
    const program = start(["--help", "--port", "x"]);
    assert.equal(await program.end(), 0);
    for (const name of ["port", "hostname", "origin", "cert", "key", "quiet", "help"]) {
      assert.match(program.out, new RegExp(`--${name}\\b`));
    }
  });

  test("--origin lets in pages of these origins, and clients that send none", async () => {
    const args = ["--origin", "https://a.example", "--origin", "https://b.example:8443"];
    const port = await start(["--port", "0", ...args]).port();
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
    const port = await start(["--port", "0", "--reuse-port"]).port();
    assert.equal(await start(["--port", `${port}`, "--reuse-port"]).port(), port);
  }, process.platform !== "linux" && "for Linux");

  test("serve() takes what is undefined as not given", async () => {
    const port = listen({ hostname: undefined });
    await assertServes(port);
    await assert.rejects(once(connectTcp(port, "::1"), "connect"), "only at 0.0.0.0");
  });

  test("importing the module starts nothing", async () => {
    const code = `await import(${JSON.stringify(new URL("server.ts", import.meta.url))})`;
    const program = new Program(process.execPath, [onDeno ? "eval" : "-e", code]);
    assert.deepEqual([await program.end(), program.out, program.err], [0, "", ""]);
  });
});

describe("TLS", () => {
  test("with --cert and --key it speaks https and wss", async () => {
    const program = start(["--port", "0", ...certificate()]);
    const port = await program.port();
    assert.equal(program.out, `Listening on https://localhost:${port}/\n`);

    const open = () => new Raw(connectTls({ port, host: "127.0.0.1", rejectUnauthorized: false }));
    const browser = open(), client = open();
    browser.socket.write("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert.equal((await browser.answer())?.body, page);
    client.socket.write(handshake());
    assert.equal((await client.answer())?.status, 101);
    assert.equal(await client.ask("secret"), "terces");
  }, withoutOpenssl);

  const http2Test = onDeno ? test : () => {}; // Bun speaks HTTP/1.1 only
  http2Test("the page comes by HTTP/2, too, as browsers ask for it", async () => {
    const port = await start(["--port", "0", ...certificate()]).port();
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
    return [frame(opcode, data.subarray(0, half), false), frame(CONTINUATION, data.subarray(half))];
  };
  const sized: Record<string, (size: number) => Buffer[]> = {
    "text": (size) => [frame(TEXT, "é".repeat(size / 2) + "x".repeat(size % 2))],
    "bytes": (size) => [frame(BINARY, Buffer.alloc(size))],
    "text in fragments": (size) => split(TEXT, Buffer.alloc(size, "x")),
    "bytes in fragments": (size) => split(BINARY, Buffer.alloc(size)),
  };
  for (const [what, frames] of Object.entries(sized)) {
    test(`1 MiB of ${what} is answered, one byte more closed with 1009`, async () => {
      const raw = await Raw.open(listen());
      raw.socket.write(Buffer.concat(frames(limit)));
      assert.equal((await raw.frame())?.data.length, limit);
      raw.socket.write(Buffer.concat(frames(limit + 1)));
      assert.match(await raw.end(), /^1009 ./);
    });
  }

  for (const size of [65_536, 16, 0]) {
    test(`a client that reads none of its replies of ${size} bytes is closed`, async () => {
      let open = true;
      subprotocols.tenfold = {
        open: (connection) => ({
          message(message) {
            for (let i = 0; i < 10; i++) connection.send(message);
          },
          close: () => void (open = false),
        }),
      };
      const port = listen();
      const [flooding, other] = [await Raw.open(port, "tenfold"), await Raw.open(port)];
      flooding.socket.pause();
      const one = frame(BINARY, Buffer.alloc(size));
      const many = Buffer.concat(Array(size > 16 ? 4 : 5000).fill(one));
      for (let i = 0; open && i < 100; i++) {
        flooding.socket.write(many);
        assert.equal(await other.ask("still here?"), "?ereh llits");
      }
      assert.ok(!open, "it was not closed");
      await assertServes(port);
      flooding.socket.resume();
      // Deno cuts off a client that goes on sending: what it had not read yet is lost.
      assert.match(await flooding.end(), onDeno ? /^1008 .|^cut$/ : /^1008 ./);
    });
  }

  test("one that floods from another process is closed, the others are served", async () => {
    const program = start(["--port", "0"]);
    const port = await program.port();
    const [flooding, other] = [await Raw.open(port), await Raw.open(port)];
    flooding.socket.pause();
    const many = Buffer.concat(Array(50).fill(frame(TEXT, "x".repeat(65_536))));
    for (let i = 0; i < 20; i++) {
      flooding.socket.write(many);
      assert.equal(await other.ask("still here?"), "?ereh llits");
    }
    await program.prints(/^closed: .*, code 1008$/m);
    assert.equal(await other.ask("still here?"), "?ereh llits");
  });

  test("a client that asks for too many replies at once is closed with 1008", async () => {
    limits.unreadReplies = 50;
    subprotocols.hundredfold = {
      open: (connection) => ({
        message(message) {
          for (let i = 0; i < 100; i++) connection.send(message);
        },
      }),
    };
    const port = listen(), raw = await Raw.open(port, "hundredfold");
    raw.socket.write(frame(TEXT, "x"));
    assert.match(await raw.end(), /^1008 ./);
    const patient = await Raw.open(port);
    for (let i = 0; i < 200; i++) assert.equal(await patient.ask("ab"), "ba", `the ${i}th`);
  });

  test("a client that reads nothing is closed when the limit of unread bytes is reached", async () => {
    limits.unreadBytes = 8 * 1024 * 1024;
    let pushed = 0;
    const ended = Promise.withResolvers<void>();
    subprotocols.push = {
      open(connection) {
        const push = () => (connection.send(new Uint8Array(1024 * 1024)), pushed++);
        const timer = setInterval(push, 5);
        return { close: () => (clearInterval(timer), ended.resolve()) };
      },
    };
    (await Raw.open(listen(), "push")).socket.pause();
    await ended.promise;
    assert.ok(
      pushed > 8 && pushed < 30,
      `after ${pushed} MiB, some of them in the kernel's buffers`,
    );
  });

  test("a client that reads nothing is closed with 1008 and finds the reason", async () => {
    const ended = Promise.withResolvers<void>();
    subprotocols.push = {
      open(connection) {
        const timer = setInterval(() => connection.send(new Uint8Array(65_536)), 1);
        return { close: () => (clearInterval(timer), ended.resolve()) };
      },
    };
    const raw = await Raw.open(listen(), "push");
    raw.socket.pause();
    await ended.promise;
    raw.socket.resume();
    assert.match(await raw.end(), /^1008 ./);
  });

  test("further handshakes are answered with 503 until a connection ends in any way", async () => {
    limits.connections = 3;
    const port = listen();
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
      "text that is not UTF-8": (socket) => socket.write(frame(TEXT, Uint8Array.of(255))),
      "a message too big": (socket) => socket.write(frame(BINARY, Buffer.alloc(limit + 1))),
    };
    const others = [await Raw.open(port), await Raw.open(port)];
    for (const [what, end] of Object.entries(ends)) {
      const third = await Raw.open(port);
      await isFull();
      end(third.socket);
      others.push(await eventually(() => Raw.open(port), what));
      await isFull();
      others.shift()!.socket.resetAndDestroy();
      await eventually(isNotFull, what);
    }
  });

  test("of many handshakes at once no more stay than there are places", async () => {
    limits.connections = 3;
    const port = listen();
    const crowd = Array.from({ length: 20 }, () => Raw.to(port));
    for (const { socket } of crowd) socket.write(handshake());
    const answers = await Promise.all(crowd.map((raw) => raw.answer()));
    const open = crowd.filter((_, i) => answers[i]?.status === 101);
    const replies = await Promise.all(open.map((raw) => raw.ask("stay")));
    assert.equal(replies.filter((reply) => reply === "yats").length, 3);
    assert.equal((await request(port, handshake())).status, 503);
  });

  test("a peer that answers no pings is let go, and its place; a living one stays", async () => {
    Object.assign(limits, { idleSeconds: 8, connections: 3 });
    const port = listen();
    const living = await connect(port);
    const dead = await Raw.open(port), hasty = Raw.to(port);
    hasty.socket.write(handshake(), () => hasty.socket.resetAndDestroy());
    await dead.end();
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
    Object.assign(subprotocols, {
      "message-throws": () => fail("thrown in message"),
      "open-throws": { open: () => fail("thrown in open") },
      "close-throws": { open: () => ({ close: () => fail("thrown in close") }) },
      "repeats": (message: Message) => fail(String(message)),
      "is-async": async (message: Message) => message,
      "gives-a-number": () => 5,
      "timer-throws": { open: () => void setTimeout(() => fail("thrown by a timer")) },
      "long-reason": { open: (connection: Connection) => connection.close(1000, "é".repeat(62)) },
      "promise-rejects": { open: () => void Promise.reject(new Error("rejected later")) },
    });`;
  const failures: Record<string, RegExp> = {
    "message-throws": /^ +Error: thrown in message\n +at .*server\.ts/m,
    "open-throws": /^ +Error: thrown in open\n +at .*server\.ts/m,
    "is-async": /^ +TypeError.*: .*must be of type string .*\n +at/m,
    "gives-a-number": /^ +TypeError.*: .*must be of type string .*\n +at/m,
    "long-reason": /^ +RangeError: .*123 bytes\n +at/m,
  };

  test("costs its own connection, with 1011, and nobody else anything", async () => {
    const program = startEdited(lines);
    const port = await program.port();
    const other = await Raw.open(port);
    for (const [name, stack] of Object.entries(failures)) {
      const raw = await Raw.open(port, name);
      raw.socket.write(
        Buffer.concat(Array(name === "message-throws" ? 2 : 1).fill(frame(TEXT, "x"))),
      );
      assert.match(await raw.end(), /^1011 ./);
      await until(program.child.stderr!, () => stack.test(program.err) || undefined);
      assert.match(program.err, stack);
      const peer = `127.0.0.1:${raw.socket.localPort}`;
      assert.equal(program.err.split("\n")[0], `failed: ${peer}, ${name}`);
      assert.equal(await other.ask("serving"), "gnivres");
      program.err = "";
    }
  });

  test("with the text of a client cannot steer the terminal, nor forge a report", async () => {
    const program = startEdited(lines);
    const raw = await Raw.open(await program.port(), "repeats");
    raw.socket.write(frame(TEXT, "\x1b[2J\nfailed: forged\x9b"));
    assert.match(await raw.end(), /^1011 ./);
    await until(program.child.stderr!, () => program.err.includes("at ") || undefined);
    assert.match(program.err, /\\u001b\[2J\n +failed: forged\\u009b\n/);
    assert.equal(program.err.match(/^failed: /gm)?.length, 1);
  });

  for (const name of ["close-throws", "timer-throws", "promise-rejects"]) {
    test(`elsewhere (${name}) is reported and ends nothing`, async () => {
      const program = startEdited(lines);
      const port = await program.port();
      const other = await Raw.open(port);
      (await Raw.open(port, name)).socket.end();
      const found = /(thrown|rejected) .*\n +at /;
      await until(program.child.stderr!, () => found.test(program.err) || undefined);
      assert.match(program.err, found);
      assert.equal(await other.ask("serving"), "gnivres");
    });
  }
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
      Buffer.concat([Buffer.from(handshake()), damaged(frame(next(16), bytes(next(200))))]),
    "half a frame": () =>
      Buffer.concat([
        Buffer.from(handshake()),
        frame(TEXT, "x".repeat(70_000)).subarray(0, next(70_000)),
      ]),
    "many pings": () =>
      Buffer.concat([Buffer.from(handshake()), ...Array(next(2000)).fill(frame(PING, "x"))]),
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
    const answers = crowd.map((raw) => (raw.socket.write(handshake()), raw.answer()));
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
      const program = start(["--port", "0"]);
      const port = await program.port();
      const [silent, half] = [await Raw.open(port), Raw.to(port)];
      half.socket.write("GET / HTTP/1.1\r\n");
      const socket = await connect(port);
      const closed = once(socket, "close");
      program.signal(signal);
      const [{ code, reason }] = await closed;
      assert.equal(code, 1001);
      assert.match(reason, /./);
      assert.match(await silent.end(), /^1001 ./);
      assert.equal(await program.end(), 0);
      assert.equal(program.out.match(/code 1001/g)?.length, 2);
      assert.equal(program.err, "");
    });
  }

  test("a second signal ends it at once", async () => {
    const program = start(["--port", "0"]);
    await program.port();
    program.signal("SIGTERM");
    program.signal("SIGINT");
    assert.equal(await program.end(), 1);
  });

  test("stop() closes the connections with 1001 and frees the port", async () => {
    const server = serve({ port: 0, hostname: "127.0.0.1", quiet: true });
    const raw = await Raw.open(server.port);
    await server.stop();
    assert.match(await raw.end(), /^1001 ./);
    await assertServes(listen({ port: server.port }));
  });
});

// ---- The page -----------------------------------------------------------------------------------

/** The little of Bun's browser that is needed. */
interface View {
  navigate(url: string): Promise<void>;
  evaluate(script: string): Promise<unknown>;
  type(text: string): Promise<void>;
  press(key: string): Promise<void>;
  click(selector: string): Promise<void>;
  resize(width: number, height: number): Promise<void>;
  close(): void;
}
const { Bun: bun } = globalThis as { Bun?: { WebView: new (options: object) => View } };
const chromium = process.env.CHROMIUM ?? "/usr/bin/chromium";

/** Opens a page in Chromium. */
async function browse(url: string): Promise<View> {
  const switches = ["no-sandbox", "disable-background-networking", "disable-component-update"];
  const argv = [...switches, "disable-sync", "ignore-certificate-errors"].map((s) => `--${s}`);
  const view = new bun!.WebView({ backend: { type: "chrome", url: false, path: chromium, argv } });
  cleanups.push(() => view.close());
  await view.navigate(url);
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

const state = (name: string) => `document.body.dataset.state === "${name}"`;
const status = (words: string) =>
  `document.getElementById("status").textContent.includes(${JSON.stringify(words)})`;
const logged = (words: string) =>
  `document.getElementById("log").textContent.includes(${JSON.stringify(words)})`;
const color = `getComputedStyle(document.querySelector("header")).backgroundColor`;

if (bun) {
  describe("the page", () => {
    const missing = without(chromium, existsSync(chromium));
    const pageTest = (name: string, run: () => Promise<void>, skip = missing) =>
      test(name, run, skip);
    const green = `${color} === "rgb(92, 203, 107)"`;
    const amber = `${color} === "rgb(255, 191, 0)"`;
    const red = `${color} === "rgb(255, 92, 85)"`;

    pageTest("connects, sends with Enter and shows the reply", async () => {
      const port = listen();
      const view = await browse(`http://localhost:${port}/`);
      await shows(view, state("connected"), green, status(NAME));
      await shows(view, status(`Connected to ws://localhost:${port}/`));
      await view.type("Hello, world!");
      await view.press("Enter");
      await shows(view, logged("!dlrow ,olleH"), logged("13 bytes sent, 13 bytes back in "));
      await shows(view, "message.value === ''", "document.activeElement === message");
    });

    pageTest("shows messages as text, never as markup, the newest first", async () => {
      const view = await browse(`http://localhost:${listen()}/`);
      await shows(view, state("connected"));
      for (const message of ["<b>bold</b><script>document.title = 1</script>", "last"]) {
        await view.type(message);
        await view.click("#send");
      }
      await shows(view, logged("<b>bold</b>"), logged(">b/<dlob>b<"), logged("tsal"));
      await shows(view, "log.querySelector('b, script') === null", "document.title !== '1'");
      const top = (n: number) => `log.children[${n}].getBoundingClientRect().top`;
      await shows(view, `log.children.length === 2 && ${top(1)} < ${top(0)}`);
    });

    pageTest("sends bytes typed in hex, and says what is no byte", async () => {
      const view = await browse(`http://localhost:${listen()}/`);
      await shows(view, state("connected"));
      await view.click("#hex");
      await view.click("#message");
      await view.type("01 xy");
      await view.press("Enter");
      await shows(view, "error.textContent.includes('xy')", "log.children.length === 0");
      await view.evaluate("message.value = ''");
      await view.type("01 02fF");
      await view.press("Enter");
      await shows(view, logged("ff 02 01"), "error.textContent === ''");
    });

    pageTest("says that the server is lost, keeps what is typed, and sends it later", async () => {
      const server = serve({ port: 0, hostname: "127.0.0.1", quiet: true });
      const view = await browse(`http://localhost:${server.port}/`);
      await shows(view, state("connected"));
      await server.stop();
      await shows(view, state("lost") + "||" + state("failed"), logged("lost"), logged("1001"));
      await shows(view, red, status("Next try in"));
      await view.type("meanwhile");
      await view.press("Enter");
      await shows(view, logged("waiting for a connection"));
      listen({ port: server.port });
      await shows(view, state("connected"), green, logged("elihwnaem"));
    });

    pageTest("explains a message too big, and connects again without it", async () => {
      const view = await browse(`http://localhost:${listen()}/`);
      await shows(view, state("connected"));
      await view.evaluate(`message.value = "x".repeat(${limits.messageBytes + 1})`);
      await view.press("Enter");
      await shows(view, logged("message was too big"), logged("1009"), state("connected"));
    });

    pageTest("?server= names another server; while it is silent the page is amber", async () => {
      const silent = createServer(() => {}).listen(0, "127.0.0.1");
      cleanups.push(() => silent.close());
      await once(silent, "listening");
      const [port, other] = [listen(), (silent.address() as AddressInfo).port];
      const address = (port: number) => `ws://127.0.0.1:${port}/any/path`;
      const view = await browse(`http://localhost:${port}/?server=${address(other)}`);
      await shows(view, state("connecting"), amber, status(`Connecting to ${address(other)}`));
      await view.navigate(`http://localhost:${port}/?server=${address(listen())}`);
      await shows(view, state("connected"), status("/any/path"));
      for (const wrong of ["nonsense", "", "ftp://localhost/"]) {
        await view.navigate(`http://localhost:${port}/?server=${wrong}`);
        await shows(view, state("failed"), red, status(`“${wrong}” is not`));
      }
    });

    pageTest("uses wss where it came by https", async () => {
      const port = await start(["--port", "0", ...certificate()]).port();
      const view = await browse(`https://localhost:${port}/`);
      await shows(view, state("connected"), status(`wss://localhost:${port}/`));
    }, missing || withoutOpenssl);

    pageTest("uses ws://localhost:9000/ where it was opened as a file", async () => {
      const view = await browse(new URL("index.html", import.meta.url).href);
      await shows(view, status("ws://localhost:9000/"));
    });

    pageTest("keeps its newest 200 rows", async () => {
      const view = await browse(`http://localhost:${listen()}/`);
      await shows(view, state("connected"));
      await view.evaluate(`(() => {
        for (let i = 0; i < 300; i++) {
          message.value = "number " + i;
          form.requestSubmit();
        }
      })()`);
      await shows(view, logged("992 rebmun"), "log.children.length === 200");
    });

    pageTest("has a language and labels, and fits a window of 320 pixels", async () => {
      const view = await browse(`http://localhost:${listen()}/`);
      await shows(view, state("connected"), "document.documentElement.lang === 'en'");
      await shows(view, "[...document.querySelectorAll('input')].every((i) => i.labels.length)");
      await view.resize(320, 600);
      await shows(view, "innerWidth === 320", "document.body.scrollWidth <= 320");
    });
  });
}

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
