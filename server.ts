/**
 * A WebSocket server for Deno and Bun that answers each message with the message reversed.
 *
 * To be read from the top: what the server says, what happens to a message, how a request becomes
 * a socket, the two runtimes side by side, how it starts and stops.
 */
import { Buffer } from "node:buffer";
import { createHash } from "node:crypto";
import { readFileSync, write } from "node:fs";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs, promisify } from "node:util";
import page from "./index.html" with { type: "text" };

const onBun = typeof Bun !== "undefined";

// ---- What the server says -----------------------------------------------------------------------
// The subprotocols and the limits. A new subprotocol is one entry in the table, and independent of
// the others: a function from a message to its reply or, for one that speaks first or remembers
// something, an object whose `open` is called with each new connection.

/** The text of a text message, or the bytes of a binary one. */
export type Message = string | Uint8Array<ArrayBuffer>;

/** Gives the reply to a message; nothing: no reply. It must not be async. */
export type Reply = (message: Message) => Message | void;

/** What a connection calls: `message` with each message, `close` once after its end. */
export type Handlers = { message?: Reply; close?(): void };

/** An entry of the table. */
export type Subprotocol = Reply | { open(connection: Connection): Handlers | void };

/** From a subprotocol's name to what it does with a message. */
export const subprotocols: Record<string, Subprotocol> = {
  "dumb-increment-protocol": reverse,
};

/** The limits of a server: to be changed here. */
export const limits = {
  messageBytes: 1024 * 1024, // a longer message closes its connection (1009)
  unreadBytes: 2 * 1024 * 1024, // more than this of replies left unread does, too (1008)
  connections: 10_000, // open at once; further handshakes are answered with 503
  idleSeconds: 108, // without a sign of life; 1 MiB at 100 kbit/s takes 84
  stopSeconds: 1, // for goodbyes when the server stops
  burst: 50_000, // Bun: a client with more messages in a row, before others are read, is cut off
  logBytes: 256 * 1024, // shown of each tenth of a second; further lines are only counted
};

// ---- What happens to a message ------------------------------------------------------------------
// It is reversed. Text in the order in which people read it takes the segmenter, 100 to 400 ns for
// each UTF-16 unit, where all else here takes 0.4 to 5: most of this part is about asking it little.
// Who came for the sockets may go on below it.

/**
 * Gives a text's user-perceived characters (extended grapheme clusters, UAX #29, as the runtime's
 * `Intl.Segmenter` cuts them) in reverse order, and bytes in reverse order. So `"noe\u0308l🇩🇪"`
 * becomes `"🇩🇪le\u0308on"`. Reversing twice need not give the same text again: `"\n\r"` becomes
 * `"\r\n"`, which is one cluster.
 */
export function reverse(message: Message): Message {
  return typeof message === "string" ? reverseText(message) : message.toReversed();
}

// Two plain UTF-16 units side by side never share a cluster. A short probe tells once of each unit
// whether it is plain (1), or a mark, joiner, jamo, CR or half an emoji (2), around which to ask.
const segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });
const kinds = new Uint8Array(0x10000).fill(2, 0xd800, 0xe000); // surrogates

function isPlain(unit: number): boolean {
  if (kinds[unit] === 0) {
    const c = String.fromCharCode(unit);
    kinds[unit] = [...segmenter.segment(`a${c}${c}a${c}\n`)].length === 6 ? 1 : 2;
  }
  return kinds[unit] === 1;
}

// Room for the longest message, in three views; a longer text is left to the segmenter.
const bytes = Buffer.alloc(2 * limits.messageBytes);
const units = new Uint16Array(bytes.buffer), view = new DataView(bytes.buffer);

function reverseText(text: string): string {
  const n = text.length;
  if (n > units.length) {
    return [...segmenter.segment(text)].map((s) => s.segment).reverse().join("");
  }
  if (n > 32 && bytes.write(text) === n && !text.includes("\r")) return reverseAscii(n);
  let latin = 0; // text of Latin-1 alone leaves as such, which is faster to send
  for (let unit; latin < n && (unit = text.charCodeAt(latin)) < 256 && isPlain(unit); latin++) {
    bytes[n - 1 - latin] = unit;
  }
  if (latin === n) return bytes.toString("latin1", 0, n);
  let segments: Intl.Segments | undefined;
  for (let start = 0, end = 0; start < n; start = end) {
    while (end < n && isPlain(text.charCodeAt(end))) units[n - 1 - end] = text.charCodeAt(end++);
    if (end === n) break;
    start = Math.max(start, end - 1); // the last plain one may belong to what follows
    end = start + (segments ??= segmenter.segment(text)).containing(start)!.segment.length;
    for (let from = start, to = n - end; from < end;) units[to++] = text.charCodeAt(from++);
  }
  return bytes.toString("utf16le", 0, 2 * n);
}

/** Reverses ASCII in `bytes`, four at a time, in a fifth of the time of `bytes.reverse()`. */
function reverseAscii(n: number): string {
  const size = n + 3 & ~3;
  for (let i = 0, j = size - 4; i <= j; i += 4, j -= 4) {
    const left = view.getUint32(i, true), right = view.getUint32(j, true);
    view.setUint32(i, right); // read from the right, written from the left
    view.setUint32(j, left);
  }
  return bytes.toString("latin1", size - n, size);
}

// ---- How a request becomes a page, a refusal or a socket ----------------------------------------
// A WebSocket begins as a GET, the handshake, whose answer 101 upgrades it from HTTP to a socket.
// The server checks a request itself before the runtime upgrades it, so that both runtimes answer
// alike. What they answer by themselves never comes here: 400 for HTTP/1.1 without a Host and no
// answer to an unknown method (Bun), 400 for two Hosts (Deno).

// The page may use the style and script that stand in it and open WebSockets, nothing else.
const inline = [...page.matchAll(/<(?:style|script)[^>]*>([^]*?)<\/(?:style|script)>/g)]
  .map(([, text]) => `'sha256-${createHash("sha256").update(text).digest("base64")}'`).join(" ");
const policy = `default-src 'none'; style-src ${inline}; script-src ${inline}; ` +
  "img-src data:; connect-src ws: wss:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

function respond(status: number, text: string, headers = {}, type = "text/plain"): Response {
  const basic = { "content-type": `${type}; charset=utf-8`, "x-content-type-options": "nosniff" };
  return new Response(text, { status, headers: { ...basic, ...headers } });
}

const KEY = /^[A-Za-z0-9+/]{22}==$/; // 16 bytes in base64
const WEBSOCKET = /(^|,)\s*websocket\s*(,|$)/i, UPGRADE = /(^|,)\s*upgrade\s*(,|$)/i; // of a list

/** Gives the name of the subprotocol to upgrade to, or the page, or a refusal. */
function answer({ method, url, headers }: Request, origins: string[]): Response | string {
  const get = (name: string) => headers.get(name) ?? "";
  const path = URL.canParse(`http://${get("host") || "none"}`) && URL.parse(url)?.pathname;
  const upgrade = WEBSOCKET.test(get("upgrade")), key = headers.get("sec-websocket-key");
  const handshake = upgrade || key !== null;
  const foreign = origins.length > 0 && headers.has("origin") && !origins.includes(get("origin"));
  const refuse = (status: number, why: string, more = {}) => respond(status, why + "\n", more);
  const spoken = Object.keys(subprotocols);
  const offers = get("sec-websocket-protocol").split(",").map((offer) => offer.trim());
  const name = offers.find((offer) => spoken.includes(offer));

  if (!path) return refuse(400, "The URL or the Host header is not valid.");
  if (!/^(GET|HEAD)$/.test(method)) return refuse(405, "Use GET.", { allow: "GET, HEAD" });
  if (!handshake && path !== "/") return refuse(404, "The page is at /.");
  if (!handshake) return respond(200, page, { "content-security-policy": policy }, "text/html");

  // RFC 6455 section 4.2.1; a proxy may have removed some of these headers.
  if (method !== "GET") return refuse(405, "A handshake uses GET.", { allow: "GET" });
  if (!get("host")) return refuse(400, "The Host header is missing.");
  if (!upgrade) return refuse(400, "The header Upgrade: websocket is missing.");
  if (!UPGRADE.test(get("connection"))) return refuse(400, "Connection: Upgrade is missing.");
  if (get("sec-websocket-version") !== "13") {
    return refuse(426, "Sec-WebSocket-Version must be 13.", { "sec-websocket-version": "13" });
  }
  if (!KEY.test(key ?? "")) return refuse(400, "Sec-WebSocket-Key must be 16 bytes in base64.");
  if (foreign) return refuse(403, "Pages of your origin may not connect.");
  return name ?? refuse(400, `Sec-WebSocket-Protocol must offer one of: ${spoken.join(", ")}.`);
}

/** What a connection needs of a socket: Bun's has it, Deno's is given it below. */
interface Socket {
  send(message: Message): number; // more than 0: nothing waits
  getBufferedAmount(): number; // in bytes
  close(code: number, reason: string): void;
}

/** What the connections of a server share. */
type Shared = { connections: Set<Connection>; log(line: () => string): void };

/** One connection, the same on both runtimes. Subprotocols may `send` and `close`. */
export class Connection {
  #socket?: Socket; // from its opening to its end
  #handlers?: Handlers;

  constructor(readonly subprotocol: string, readonly peer: string, readonly shared: Shared) {}

  /** Sends a message. A client that leaves more than `limits.unreadBytes` unread is closed. */
  send(message: Message): void {
    if (typeof message !== "string" && !(message instanceof Uint8Array)) {
      throw new TypeError("a message must be a string or a Uint8Array");
    }
    if (!this.#socket || this.#socket.send(message) > 0) return;
    const unread = this.#socket.getBufferedAmount();
    if (unread > limits.unreadBytes) this.close(1008, "too many unread replies");
  }

  /** Closes, with a code of RFC 6455 section 7.4 and a reason of at most 123 bytes. */
  close(code = 1000, reason = ""): void {
    if (Buffer.byteLength(reason) > 123) throw new RangeError("a reason has at most 123 bytes");
    this.#socket?.close(code, reason);
    this.ended(code);
  }

  // What follows is called by the adapters below: `opened`, then `received` for each message, `ended`.

  opened(socket: Socket): void {
    this.#socket = socket;
    this.shared.connections.add(this);
    this.shared.log(() => `connected: ${this.peer}, ${this.subprotocol}`);
    const full = this.shared.connections.size > limits.connections;
    if (full) return this.close(1013, "all connections are in use");
    this.#attempt(() => {
      const entry = subprotocols[this.subprotocol];
      this.#handlers = typeof entry === "function" ? { message: entry } : entry.open(this) ?? {};
      if (!this.#socket) this.#handlers.close?.(); // it was closed in `open`
    });
  }

  received(message: Message): void {
    this.#attempt(() => {
      const reply = this.#handlers?.message?.(message);
      if (reply !== undefined) this.send(reply);
      this.shared.log(() =>
        `received data: ${show(message)}` +
        (reply === undefined ? "" : `, replying: ${show(reply)}`)
      );
    });
  }

  /** A runtime may tell of one end twice. */
  ended(code: number): void {
    if (!this.#socket) return;
    this.#socket = undefined;
    this.shared.connections.delete(this);
    this.shared.log(() => `closed: ${this.peer}, code ${code}`);
    this.#attempt(() => this.#handlers?.close?.());
  }

  /** An exception in a subprotocol ends its connection (1011) and nothing else. */
  #attempt(step: () => void): void {
    try {
      step();
    } catch (error) {
      report(`${this.peer}, ${this.subprotocol}`, error);
      this.close(1011, "internal error");
    }
  }
}

// ---- The two runtimes, side by side -------------------------------------------------------------
// Each asks `accept` (which `serve`, below, gives it) about a request: a Response is sent; for a
// Connection, the request is upgraded, and the connection told what happens to its socket.

type Accept = (request: Request, peer: () => string) => Response | Connection;

function listenDeno(options: Options, accept: Accept): Server {
  const start = (port?: number) => Deno.serve({ ...options, port, onListen() {} }, handle);
  let server = start(options.port);
  const { port } = server.addr;
  // It stops listening when file descriptors run out; then it tries until it can again.
  const again = (): Promise<void> =>
    sleep(250).then(() => (server = start(port)).finished).catch(again);
  server.finished.catch(again);
  return { port, stop: () => server.shutdown() };

  function handle(request: Request, info: Deno.ServeHandlerInfo<Deno.NetAddr>): Response {
    const connection = accept(request, () => place(info.remoteAddr.hostname, info.remoteAddr.port));
    if (connection instanceof Response) return connection;
    // Deno would look for the subprotocol only among offers spelt "a, b": it shall find just this.
    const { headers } = request, protocol = connection.subprotocol, { get } = headers;
    headers.get = (name) => /protocol$/i.test(name) ? protocol : get.call(headers, name);
    const how = { protocol, idleTimeout: limits.idleSeconds };
    const { socket, response } = Deno.upgradeWebSocket(request, how);
    attach(socket, connection);
    return response;
  }
}

// Deno queues replies without bound, with about 1 KiB for each beside its bytes. `bufferedAmount`
// tells how many of the bytes wait, and so about how many replies. That is sure only once the event
// loop has turned; of empty replies it is never seen, so in a row each counts as 64 bytes.
function attach(socket: WebSocket, connection: Connection): void {
  let bytes = 0, replies = 0, empty = 0, late = 0; // 1: too much waits, 2: still after a turn
  const unread = () => bytes + 1024 * replies;
  const measure = () => {
    const left = socket.bufferedAmount;
    replies *= Math.min(1, left / (bytes || 1));
    bytes = left;
    if (unread() <= limits.unreadBytes) late = 0;
    else if (late === 0) {
      late = 1;
      setTimeout(() => late &&= 2);
    }
  };
  socket.binaryType = "arraybuffer";
  socket.onopen = () =>
    connection.opened({
      send(message) {
        socket.send(message);
        bytes += message.length;
        replies++;
        empty = message.length > 0 ? 0 : empty + 1;
        if (unread() > limits.unreadBytes) measure();
        return 0;
      },
      getBufferedAmount: () => late === 2 ? unread() : 64 * empty,
      close: (code, reason) => socket.close(code, reason),
    });
  socket.onmessage = ({ data }) => {
    const message = typeof data === "string" ? data : new Uint8Array(data);
    if (Buffer.byteLength(message) <= limits.messageBytes) connection.received(message);
    else connection.close(1009, "message too big");
  };
  socket.onclose = ({ code }) => connection.ended(code || 1006);
}

/** The little of Bun's types that is needed. */
declare const Bun: { serve(options: object): BunServer };
type BunSocket = Socket & { data: Connection; binaryType: string; terminate(): void };
interface BunServer {
  port: number;
  stop(closeAll: boolean): Promise<void>;
  requestIP(request: Request): { address: string; port: number } | null;
  upgrade(request: Request, options: { headers: HeadersInit; data: Connection }): boolean;
}

function listenBun({ cert, key, reusePort = false, ...where }: Options, accept: Accept): Server {
  const tls = cert && { cert, key };
  let reading: BunSocket | undefined, burst = 0;
  const websocket = {
    maxPayloadLength: limits.messageBytes,
    idleTimeout: limits.idleSeconds,
    open(socket: BunSocket) {
      socket.binaryType = "uint8array";
      socket.data.opened(socket);
    },
    // Bun reads a client that floods for seconds before it turns to another.
    message(socket: BunSocket, message: Message) {
      burst = socket === reading ? burst + 1 : 1;
      reading = socket;
      if (burst % 1000 === 0) setImmediate(() => reading = undefined);
      if (burst <= limits.burst) socket.data.received(message);
      else socket.terminate();
    },
    close: (socket: BunSocket, code: number, reason: string) =>
      socket.data.ended(reason === "Received too big message" ? 1009 : code),
  };
  function fetch(request: Request, server: BunServer): Response | void {
    const ip = () => server.requestIP(request);
    const connection = accept(request, () => place(ip()?.address, ip()?.port));
    if (connection instanceof Response) return connection;
    const headers = { "sec-websocket-protocol": connection.subprotocol };
    if (server.upgrade(request, { headers, data: connection })) return;
    return respond(400, "This handshake is not valid.\n");
  }
  const server = Bun.serve({ ...where, reusePort, tls, development: false, fetch, websocket });
  return { port: server.port, stop: () => server.stop(true) };
}

// ---- How it starts and stops --------------------------------------------------------------------

/** Options of {@linkcode serve}, as `usage` explains them; `cert` and `key` are PEM texts. */
export type Options = Partial<ReturnType<typeof parse>>;

/** A running server: the port it listens on; `stop` closes all connections (1001) first. */
export type Server = { port: number; stop(): Promise<void> };

/** Starts a server, by default on port 9000. Throws if it cannot listen. */
export function serve(options: Options = {}): Server {
  const { port = 9000, hostname = "0.0.0.0", origins = [], quiet, ...where } = options;
  const shared = { connections: new Set<Connection>(), log: quiet ? () => {} : log };
  const listen = onBun ? listenBun : listenDeno;
  const server = listen({ port, hostname, ...where }, (request, peer) => {
    const found = answer(request, origins);
    if (found instanceof Response) return found;
    if (shared.connections.size < limits.connections) {
      return new Connection(found, quiet ? "a client" : peer(), shared);
    }
    return respond(503, "All connections are in use: try later.\n", { "retry-after": "10" });
  });
  const stop = async () => {
    for (const connection of shared.connections) connection.close(1001, "the server is stopping");
    const longest = sleep(limits.stopSeconds * 1000, null, { ref: false });
    await Promise.race([server.stop().then(() => sleep(100)), longest]); // what is on its way
  };
  return { port: server.port, stop };
}

// The log is written ten times a second, many lines at once; what is more than anybody can read, or
// the other end takes, is only counted. So it costs a busy server little, and never stops it.
const lines = Buffer.alloc(limits.logBytes);
let used = 0, more = 0, logged: Promise<unknown> = Promise.resolve();

function log(line: () => string): void {
  if (used === 0) logged = Promise.all([logged, sleep(100)]).then(flush);
  if (used < lines.length - 2000) used += lines.write(line() + "\n", used);
  else more++;
}

function flush(): Promise<unknown> {
  if (more > 0) used += lines.write(`(${more} more lines)\n`, used);
  const text = Buffer.from(lines.subarray(0, used));
  used = more = 0;
  return print(text);
}

// `console.log` would block while nobody reads, and so would `write` on Deno.
function print(text: Uint8Array): Promise<unknown> {
  const written = onBun ? promisify(write)(1, text) : Deno.stdout.write(text);
  return written.catch(() => {}); // nobody wants it
}

/** A message as the log shows it: its first 80 characters, or the number of its bytes. */
function show(message: Message): string {
  if (typeof message !== "string") return `${message.length} bytes`;
  const start = message.length <= 80 ? message : [...message.slice(0, 160)].slice(0, 80).join("");
  return escape(start) + (start === message ? "" : `… (length ${message.length})`);
}

/** Client text must not steer the terminal, nor look like a line of the log. */
function escape(text: string): string {
  const code = (c: string) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0");
  return text.replace(/[\p{Cc}\p{Zl}\p{Zp}\p{Bidi_Control}]/gu, code);
}

function report(where: string, error: unknown): void {
  const text = error instanceof Error && error.stack || String(error);
  console.error(`failed: ${where}\n` + text.split("\n").map(escape).join("\n"));
}

function place(host = "unknown", port = 0): string {
  return `${host.includes(":") ? `[${host}]` : host}:${port}`;
}

const usage = `A WebSocket server that answers each message with the message reversed.

  --port N           listen on this port; 0: any free one (default: PORT, else 9000)
  --hostname NAME    listen on this address (default: 0.0.0.0)
  --origin ORIGIN    let only pages of this origin connect (may be repeated)
  --cert F --key F   speak TLS, with these PEM files (Deno: --allow-read)
  --reuse-port       share the port with other processes
  --quiet            log only errors
  --help             show this`;

/** Reads the command line. Throws if it is wrong. */
function parse(args: string[]) {
  const text = { type: "string" } as const, flag = { type: "boolean" } as const;
  const where = { port: text, hostname: text, "reuse-port": flag, cert: text, key: text };
  const origin = { ...text, multiple: true } as const;
  const { values } = parseArgs({ args, options: { ...where, origin, quiet: flag, help: flag } });
  const { hostname, quiet, help, "reuse-port": reusePort, origin: origins } = values;
  const [cert, key] = [values.cert, values.key].map((file) => file && readFileSync(file, "utf8"));
  if (!cert !== !key || cert === "") throw new Error("--cert and --key go together, a file each");
  // Deno would stop and ask for leave to read PORT.
  const read = { name: "env", variable: "PORT" } as const;
  const mayRead = onBun || Deno.permissions.querySync(read).state === "granted";
  const port = values.port ?? (mayRead && process.env.PORT || "9000");
  if (!/^\d{1,5}$/.test(port) || Number(port) > 65535) {
    throw new Error(`the port must be a number from 0 to 65535, not '${port}'`);
  }
  return { port: Number(port), hostname, reusePort, cert, key, origins, quiet, help };
}

/** Runs until a signal; a second one ends it at once. */
function run(options: Options): void {
  const server = serve(options);
  let signals = 0;
  const end = async () => {
    if (++signals > 1) process.exit(1);
    await server.stop();
    await Promise.race([logged, sleep(100)]);
    process.exit(0);
  };
  process.on("SIGINT", end).on("SIGTERM", end);
  for (const event of ["uncaughtException", "unhandledRejection"]) {
    process.on(event, (error) => report(event, error));
  }
  const host = (options.hostname ?? "").replace(/^(0\.0\.0\.0|::|)$/, "localhost");
  const url = `http${options.cert ? "s" : ""}://${place(host, server.port)}/`;
  print(Buffer.from(`Listening on ${url}\n`));
}

if (import.meta.main) {
  let options: Options = {};
  try {
    options = parse(process.argv.slice(2));
    if (options.help) console.log(usage);
    else run(options);
  } catch (error) {
    const { code, message } = error as Error & { code?: string };
    const used = code === "EADDRINUSE" && `port ${options.port} is in use: try another --port`;
    console.error(`Cannot start: ${used || message.split("\n")[0]} (see --help)`);
    process.exit(1);
  }
}
