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
import { parseArgs } from "node:util";
import page from "./index.html" with { type: "text" };

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
  logLines: 2000, // shown of each tenth of a second; the others are only counted
};

// ---- What happens to a message ------------------------------------------------------------------

/**
 * Gives a text's user-perceived characters (extended grapheme clusters, UAX #29, as the runtime's
 * `Intl.Segmenter` cuts them) in reverse order, and bytes in reverse order. So `"noe\u0308l🇩🇪"`
 * becomes `"🇩🇪le\u0308on"`. Reversing twice need not give the same text again: `"\n\r"` becomes
 * `"\r\n"`, which is one cluster.
 */
export function reverse(message: string): string;
export function reverse(message: Message): Message;
export function reverse(message: Message): Message {
  return typeof message === "string" ? reverseText(message) : message.toReversed();
}

// The segmenter costs 100 to 400 ns for each UTF-16 unit, all else here 0.4 to 5. So a short probe
// asks it once about each unit whether that is plain: two plain neighbours never share a cluster.
// Only where others stand (marks, joiners, emoji, jamo, CR) is it asked about the text itself.
const segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });
const UNKNOWN = 0, PLAIN = 1, JOINING = 2;
const kinds = new Uint8Array(0x10000).fill(JOINING, 0xd800, 0xe000); // surrogates

function isPlain(unit: number): boolean {
  if (kinds[unit] === UNKNOWN) {
    const c = String.fromCharCode(unit);
    const clusters = [...segmenter.segment(`a${c}${c}a${c}\n`)];
    kinds[unit] = clusters.length === 6 ? PLAIN : JOINING;
  }
  return kinds[unit] === PLAIN;
}

// Room for the longest message, in three views; longer texts have to do without.
const bytes = Buffer.alloc(2 * limits.messageBytes);
const units = new Uint16Array(bytes.buffer), view = new DataView(bytes.buffer);

function reverseText(text: string): string {
  const n = text.length;
  if (n > units.length) {
    return Array.from(segmenter.segment(text), (s) => s.segment).reverse().join("");
  }
  if (n > 32 && Buffer.byteLength(text) === n && !text.includes("\r\n")) return reverseAscii(text);
  let segments: Intl.Segments | undefined;
  for (let start = 0, end = 0; start < n; start = end) {
    for (; end < n; end++) {
      const unit = text.charCodeAt(end);
      if (!isPlain(unit)) break;
      units[n - 1 - end] = unit;
    }
    if (end === n) break;
    if (end > start) start = end - 1; // the last plain one may belong to what follows
    segments ??= segmenter.segment(text);
    end = start + segments.containing(start)!.segment.length;
    for (let from = start, to = n - end; from < end;) units[to++] = text.charCodeAt(from++);
  }
  return bytes.toString("utf16le", 0, 2 * n);
}

/** Four bytes at a time, a third of the time of `bytes.reverse()`. */
function reverseAscii(text: string): string {
  const size = text.length + 3 & ~3;
  bytes.write(text);
  for (let i = 0, j = size - 4; i <= j; i += 4, j -= 4) {
    const left = view.getUint32(i, true), right = view.getUint32(j, true);
    view.setUint32(i, right); // read from the right, written from the left
    view.setUint32(j, left);
  }
  return bytes.toString("latin1", size - text.length, size);
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

// Items of a list, in any case.
const WEBSOCKET = /(^|,)\s*websocket\s*(,|$)/i, UPGRADE = /(^|,)\s*upgrade\s*(,|$)/i;

/** Gives the name of the subprotocol to upgrade to, or the page, or a refusal. */
function look(request: Request, origins: string[] = []): Response | string {
  const { headers, method, url } = request;
  const host = headers.get("host"), origin = headers.get("origin");
  const upgrade = headers.get("upgrade") ?? "", connection = headers.get("connection") ?? "";
  const version = headers.get("sec-websocket-version"), key = headers.get("sec-websocket-key");
  const offers = headers.get("sec-websocket-protocol") ?? "";
  const refuse = (status: number, why: string, more = {}) => respond(status, why + "\n", more);

  if (!URL.canParse(url) || !URL.canParse(`http://${host ?? "absent"}`)) {
    return refuse(400, "The URL or the Host header is not valid.");
  }
  if (!/^(GET|HEAD)$/.test(method)) return refuse(405, "Use GET.", { allow: "GET, HEAD" });
  const handshake = key !== null || WEBSOCKET.test(upgrade);
  if (!handshake && new URL(url).pathname !== "/") return refuse(404, "The page is at /.");
  if (!handshake) return respond(200, page, { "content-security-policy": policy }, "text/html");

  // RFC 6455 section 4.2.1; a proxy may have removed some of these headers.
  if (method !== "GET") return refuse(405, "A handshake uses GET.", { allow: "GET" });
  if (!host) return refuse(400, "The Host header is missing.");
  if (!WEBSOCKET.test(upgrade)) return refuse(400, "The header Upgrade: websocket is missing.");
  if (!UPGRADE.test(connection)) return refuse(400, "The header Connection: Upgrade is missing.");
  if (version !== "13") {
    return refuse(426, "Sec-WebSocket-Version must be 13.", { "sec-websocket-version": "13" });
  }
  if (!/^[A-Za-z0-9+/]{22}==$/.test(key ?? "")) {
    return refuse(400, "Sec-WebSocket-Key must be 16 bytes in base64.");
  }
  if (origins.length > 0 && origin !== null && !origins.includes(origin)) {
    return refuse(403, "Pages of your origin may not connect.");
  }
  const spoken = Object.keys(subprotocols);
  return offers.split(",").map((offer) => offer.trim()).find((offer) => spoken.includes(offer)) ??
    refuse(400, `Sec-WebSocket-Protocol must offer one of: ${spoken.join(", ")}.`);
}

/** What a connection needs of a socket: Bun's has it, Deno's is given it below. */
interface Socket {
  send(message: Message): number; // more than 0: all has left
  getBufferedAmount(): number; // in bytes
  close(code: number, reason: string): void;
}

/** One connection, the same on both runtimes. Subprotocols may `send` and `close`. */
export class Connection {
  #socket?: Socket; // from its opening to its end
  #handlers: Handlers = {};
  #since = Date.now();

  constructor(readonly subprotocol: string, readonly peer: string, readonly state: State) {
    state.connections.add(this);
  }

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
    this.#socket?.close(code, reason);
    this.ended(code);
  }

  opened(socket: Socket): void {
    this.#socket = socket;
    this.state.connections.add(this); // again, if it had expired
    this.state.log(() => `connected: ${this.peer}, ${this.subprotocol}`);
    const entry = subprotocols[this.subprotocol];
    this.#attempt(() => {
      this.#handlers = typeof entry === "function" ? { message: entry } : entry.open(this) ?? {};
      if (!this.#socket) this.#handlers.close?.(); // it was closed in `open`
    });
  }

  received(message: Message): void {
    this.#attempt(() => {
      const reply = this.#handlers.message?.(message);
      if (reply !== undefined) this.send(reply);
      const replying = () => reply === undefined ? "" : `, replying: ${show(reply)}`;
      this.state.log(() => `received data: ${show(message)}${replying()}`);
    });
  }

  /** When the server is full: Deno does not tell of clients that left before their socket opened. */
  expire(): void {
    if (!this.#socket && Date.now() - this.#since > 1000) this.ended(1006);
  }

  /** A runtime may tell of one end twice. */
  ended(code: number): void {
    if (!this.state.connections.delete(this) || !this.#socket) return;
    this.#socket = undefined;
    this.state.log(() => `closed: ${this.peer}, code ${code}`);
    this.#attempt(() => this.#handlers.close?.());
  }

  /** An exception in a subprotocol ends its connection (1011) and nothing else. */
  #attempt(step: () => void): void {
    try {
      step();
    } catch (error) {
      report(error);
      this.close(1011, "internal error");
    }
  }
}

// ---- The two runtimes, side by side -------------------------------------------------------------
// Each asks `accept` (which `serve`, below, gives it) about a request: a Response is sent; for a
// Connection, the request is upgraded, and the connection told what happens to its socket.

type Accept = (request: Request, peer: () => string) => Response | Connection;

function listenDeno(options: Options, accept: Accept): Server {
  let server: Deno.HttpServer<Deno.NetAddr>;
  start(options.port);
  return { port: server!.addr.port, stop: () => server.shutdown() };

  // It stops listening when file descriptors run out; then it tries until it can again.
  function start(port?: number): void {
    server = Deno.serve({ ...options, port, onListen() {} }, handle);
    const again = (): Promise<void> => sleep(250).then(() => start(server.addr.port)).catch(again);
    server.finished.catch(again);
  }

  function handle(request: Request, info: Deno.ServeHandlerInfo<Deno.NetAddr>): Response {
    const peer = () => host(info.remoteAddr.hostname, info.remoteAddr.port);
    const connection = accept(request, peer);
    if (connection instanceof Response) return connection;
    const protocol = connection.subprotocol, idleTimeout = limits.idleSeconds;
    offerOnly(protocol, request.headers);
    const { socket, response } = Deno.upgradeWebSocket(request, { protocol, idleTimeout });
    attach(socket, connection);
    return response;
  }
}

function attach(socket: WebSocket, connection: Connection): void {
  // Deno queues without bound, and with about 1 KiB for each reply beside its bytes. Whether they
  // leave shows after the event loop has turned; of empty ones it never shows.
  let queued = 0, empty = 0, blocked = false, measuring = false;
  const unread = () => socket.bufferedAmount + 1024 * queued;
  const measure = () => {
    measuring = false;
    blocked = socket.bufferedAmount > 0;
    if (!blocked) queued = 0;
  };
  socket.binaryType = "arraybuffer";
  socket.onopen = () =>
    connection.opened({
      send(message) {
        if (blocked) measure();
        socket.send(message);
        queued++;
        empty = message.length === 0 ? empty + 1 : 0;
        if (!measuring && unread() > limits.unreadBytes) measuring = !!setTimeout(measure, 0);
        return 0; // see getBufferedAmount
      },
      getBufferedAmount: () => blocked ? unread() : 64 * empty, // as if 64 bytes each: 32,768 in a row reach 2 MiB
      close: (code, reason) => socket.close(code, reason),
    });
  socket.onmessage = ({ data }) => {
    const message = typeof data === "string" ? data : new Uint8Array(data);
    if (Buffer.byteLength(message) <= limits.messageBytes) connection.received(message);
    else connection.close(1009, "message too big");
  };
  socket.onclose = ({ code }) => connection.ended(code || 1006);
}

/** Deno would look for the subprotocol only among offers spelt "a, b": it shall find just this. */
function offerOnly(name: string, headers: Headers): void {
  headers.get = (key) => /protocol$/i.test(key) ? name : Headers.prototype.get.call(headers, key);
}

/** The little of Bun's types that is needed. */
declare const Bun: { serve(options: object): BunServer } | undefined;
type BunSocket = Socket & { data: Connection; binaryType: string; terminate(): void };
interface BunServer {
  port: number;
  stop(closeAll: boolean): Promise<void>;
  requestIP(request: Request): { address: string; port: number } | null;
  upgrade(request: Request, options: { headers: HeadersInit; data: Connection }): boolean;
}

function listenBun({ cert, key, ...options }: Options, accept: Accept): Server {
  let reading: BunSocket | undefined, burst = 0;
  const server = Bun!.serve({
    ...options,
    reusePort: options.reusePort ?? false, // else Bun shares the port with whoever has it
    tls: cert && { cert, key },
    development: false,
    fetch(request: Request, server: BunServer) {
      const ip = () => server.requestIP(request);
      const connection = accept(request, () => host(ip()?.address, ip()?.port));
      if (connection instanceof Response) return connection;
      const headers = { "sec-websocket-protocol": connection.subprotocol };
      if (server.upgrade(request, { headers, data: connection })) return;
      connection.ended(1006);
      return respond(400, "This handshake is not valid.\n");
    },
    websocket: {
      maxPayloadLength: limits.messageBytes,
      idleTimeout: limits.idleSeconds,
      backpressureLimit: limits.unreadBytes,
      closeOnBackpressureLimit: true,
      open(socket: BunSocket) {
        socket.binaryType = "uint8array";
        socket.data.opened(socket);
      },
      // Bun reads a client that floods for seconds before it turns to another.
      message(socket: BunSocket, message: Message) {
        if (socket !== reading) [reading, burst] = [socket, 0];
        if (++burst % 1000 === 0) setImmediate(() => reading = undefined);
        if (burst <= limits.burst) socket.data.received(message);
        else socket.terminate();
      },
      close: (socket: BunSocket, code: number, reason: string) =>
        socket.data.ended(reason === "Received too big message" ? 1009 : code),
    },
  });
  return { port: server.port, stop: () => server.stop(true) };
}

// ---- How it starts and stops --------------------------------------------------------------------

type Where = { port?: number; hostname?: string; reusePort?: boolean; cert?: string; key?: string };

/** Options of {@linkcode serve}, as `usage` explains them; `cert` and `key` are PEM texts. */
export type Options = Where & { origins?: string[]; quiet?: boolean };

/** A running server: the port it listens on; `stop` closes all connections (1001) first. */
export type Server = { port: number; stop(): Promise<void> };

/** What the connections of a server share. */
type State = { connections: Set<Connection>; log(line: () => string): void };

/** Starts a server, by default on port 9000. Throws if it cannot listen. */
export function serve({ origins, quiet, ...where }: Options = {}): Server {
  const connections = new Set<Connection>();
  const state = { connections, log: quiet ? () => {} : log };
  const listen = typeof Bun === "undefined" ? listenDeno : listenBun;
  const server = listen({ port: 9000, hostname: "0.0.0.0", ...where }, (request, peer) => {
    const found = look(request, origins);
    if (found instanceof Response) return found;
    if (connections.size >= limits.connections) connections.forEach((other) => other.expire());
    if (connections.size < limits.connections) {
      return new Connection(found, quiet ? "" : peer(), state);
    }
    return respond(503, "All connections are in use: try later.\n", { "retry-after": "10" });
  });
  const stop = async () => {
    for (const connection of connections) connection.close(1001, "the server is stopping");
    await Promise.race([server.stop(), sleep(limits.stopSeconds * 1000, null, { ref: false })]);
    await sleep(100); // for what is on its way
  };
  return { port: server.port, stop };
}

// The log is written ten times a second, many lines at once; what is more than anybody can read, or
// the other end takes, is only counted. So it costs a busy server little, and never stops it.
const lines: string[] = [];
let more = 0, writing = false;

function log(line: () => string): void {
  if (lines.length === 0) setTimeout(flush, 100);
  if (lines.length < limits.logLines) lines.push(line());
  else more++;
}

function flush(): void {
  if (writing || lines.length === 0) return;
  if (more > 0) lines.push(`(${more} more lines)`);
  print(lines.join("\n"), flush);
  lines.length = more = 0;
}

// `console.log` would block while the other end does not read; so would `write` on Deno.
function print(text: string, then?: () => void): void {
  const line = Buffer.from(text + "\n");
  const done = () => {
    writing = false;
    then?.();
  };
  writing = true;
  if (typeof Bun === "undefined") Deno.stdout.write(line).then(done, done);
  else write(1, line, done);
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

function report(error: unknown): void {
  const text = error instanceof Error && error.stack || String(error);
  console.error(text.split("\n").map(escape).join("\n"));
}

function host(name = "unknown", port = 0): string {
  return `${name.includes(":") ? `[${name}]` : name}:${port}`;
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
function parse(args: string[]): Options & { help?: boolean } {
  const text = { type: "string" } as const, flag = { type: "boolean" } as const;
  const origin = { type: "string", multiple: true } as const;
  const where = { port: text, hostname: text, "reuse-port": flag, cert: text, key: text };
  const { values } = parseArgs({ args, options: { ...where, origin, quiet: flag, help: flag } });
  const { "reuse-port": reusePort, origin: origins, hostname = "0.0.0.0", quiet, help } = values;
  const port = values.port ?? (environmentPort() || "9000");
  if (!/^\d{1,5}$/.test(port) || Number(port) > 65535) {
    throw new Error(`the port must be a number from 0 to 65535, not '${port}'`);
  }
  if (!values.cert !== !values.key) throw new Error("--cert and --key go together");
  const [cert, key] = [values.cert, values.key].map((file) => file && readFileSync(file, "utf8"));
  return { port: Number(port), hostname, reusePort, cert, key, origins, quiet, help };
}

/** PORT, where Deno may read it; otherwise Deno would stop and ask. */
function environmentPort(): string | undefined {
  const read = { name: "env", variable: "PORT" } as const;
  const ask = typeof Deno !== "undefined" && Deno.permissions.querySync(read).state !== "granted";
  return ask ? undefined : process.env.PORT;
}

function main(): void {
  let options: ReturnType<typeof parse> = {};
  try {
    options = parse(process.argv.slice(2));
    if (options.help) return console.log(usage);
    run(serve(options), options);
  } catch (error) {
    const { code, message } = error as Error & { code?: string };
    const used = code === "EADDRINUSE" && `port ${options.port} is in use: try another --port`;
    console.error(`Cannot start: ${used || message.split("\n")[0]} (see --help)`);
    process.exit(1);
  }
}

/** Runs until a signal; a second one ends it at once. */
function run(server: Server, { hostname = "", cert }: Options): void {
  let ending = false;
  const end = async () => {
    if (ending) process.exit(1);
    ending = true;
    const stopped = server.stop();
    flush();
    await stopped;
    process.exit(0);
  };
  process.on("SIGINT", end).on("SIGTERM", end);
  process.on("uncaughtException", report).on("unhandledRejection", report);
  const name = /^(0\.0\.0\.0|::|)$/.test(hostname) ? "localhost" : hostname;
  print(`Listening on http${cert ? "s" : ""}://${host(name, server.port)}/`);
}

if (import.meta.main) main();
