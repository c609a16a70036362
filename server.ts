/**
 * A WebSocket server for Deno and Bun that answers each message with the message reversed.
 *
 * To be read from the top: what the server says, what happens to a message, how a request becomes
 * a socket, the two runtimes side by side, how it starts and stops.
 */
import { Buffer } from "node:buffer";
import { hash } from "node:crypto";
import { readFileSync, write } from "node:fs";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { inspect, parseArgs, promisify } from "node:util";
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

/** From a subprotocol's name to what it does with a message. */
export const subprotocols: Record<string, Reply | { open(c: Connection): Handlers | void }> = {
  "dumb-increment-protocol": reverse,
};

/** The limits of a server: to be changed here. */
export const limits = {
  messageBytes: 1024 * 1024, // a longer message closes its connection (1009)
  unreadBytes: 2 * 1024 * 1024, // of replies; a client that leaves more unread is closed (1008)
  unreadReplies: 30_000, // so is one that leaves more than these unread, or asks for them at once
  connections: 10_000, // open at once; further handshakes are answered with 503
  idleSeconds: 108, // without a sign of life; 1 MiB at 100 kbit/s takes 84
  stopSeconds: 1, // for goodbyes when the server stops
};

// ---- What happens to a message ------------------------------------------------------------------
// It is reversed, by user-perceived character, which only the segmenter knows to tell apart. That
// takes 100 to 400 ns for each UTF-16 unit, where all else here takes 0.3 to 5: so it is asked only
// around units that are not plain. Who came for the sockets may go on below this part.

const segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });
const clusters = (text: string) => Array.from(segmenter.segment(text), ({ segment }) => segment);
const scratch = Buffer.alloc(2 * limits.messageBytes + 16), end = scratch.length;
const units = new Uint16Array(scratch.buffer), view = new DataView(scratch.buffer);

// Two plain units side by side never share a cluster. A short probe tells once of each unit whether
// it is plain (1), or a mark, joiner, jamo, CR or half an emoji (2).
const kinds = new Uint8Array(0x10000).fill(2, 0xd800, 0xe000); // surrogates
const probe = (c: string) => clusters(`a${c}${c}a${c}\n`).length === 6 ? 1 : 2;

/**
 * Gives a text's user-perceived characters (extended grapheme clusters, UAX #29, as the runtime's
 * `Intl.Segmenter` cuts them) in reverse order, and bytes in reverse order. So `"noe\u0308l🇩🇪"`
 * becomes `"🇩🇪le\u0308on"`. Reversing twice need not give the same text again: `"\n\r"` becomes
 * `"\r\n"`, which is one cluster.
 */
export function reverse(message: Message): Message {
  if (typeof message !== "string") return message.toReversed();
  const n = message.length;
  if (2 * n + 16 > end) return clusters(message).reverse().join("");
  // ASCII takes as many bytes as units. They are moved eight at a time, in half the time: read as a
  // number from the left, written from the right. No number of ASCII is a NaN, whose bits may change.
  if (scratch.write(message) === n && !message.includes("\r")) {
    view.setFloat64(n, 0); // the last number may reach beyond the text
    for (let i = 0; i < n; i += 8) view.setFloat64(end - 8 - i, view.getFloat64(i, true));
    return scratch.toString("latin1", end - n, end);
  }
  let segments: Intl.Segments | undefined;
  for (let i = 0; i < n; i++) {
    const unit = units[n - 1 - i] = message.charCodeAt(i);
    if ((kinds[unit] ||= probe(message[i])) === 1) continue;
    const { index, segment } = (segments ??= segmenter.segment(message)).containing(i)!;
    i = index + segment.length - 1; // the last unit of the cluster, whose units keep their order
    for (let from = index, to = n - 1 - i; from <= i;) units[to++] = message.charCodeAt(from++);
  }
  return scratch.toString("utf16le", 0, 2 * n);
}

// ---- How a request becomes a page, a refusal or a socket ----------------------------------------
// A WebSocket begins as a GET, the handshake, whose answer 101 upgrades it from HTTP to a socket.
// The server checks a request itself before the runtime upgrades it, so that both runtimes answer
// alike. What a runtime answers by itself never comes here: two Hosts, a handshake with a length or
// a body (Deno); no Host in HTTP/1.1, an unknown method, OPTIONS * (Bun).

// The page may use the style and script that stand in it and open WebSockets, nothing else.
const inline = [...page.matchAll(/<(?:style|script)[^>]*>([^]*?)<\/(?:style|script)>/g)]
  .map(([, text]) => `'sha256-${hash("sha256", text, "base64")}'`).join(" ");
const policy = `default-src 'none'; style-src ${inline}; script-src ${inline}; ` +
  "img-src data:; connect-src ws: wss:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const html = { "content-type": "text/html; charset=utf-8", "content-security-policy": policy };

/** What a server and its connections share; no `log` if it is to be quiet. */
type Shared = Options & { connections: Set<Connection>; log?(line: () => string): void };

/** Answers a request: with the page, a refusal, or the connection that it is to be upgraded to. */
function answer({ method, url, headers }: Request, peer: () => string, shared: Shared) {
  const get = (name: string) => headers.get(name) ?? "";
  const key = get("sec-websocket-key"), version = get("sec-websocket-version");
  const upgrade = /(^|,)[ \t]*websocket[ \t]*(,|$)/i.test(get("upgrade")); // one of a list
  const connection = /(^|,)[ \t]*upgrade[ \t]*(,|$)/i.test(get("connection"));
  const handshake = upgrade || headers.has("sec-websocket-key"); // a proxy may remove either
  const foreign = headers.has("origin") && shared.origin?.includes(get("origin")) === false;
  const offers = get("sec-websocket-protocol").split(/[ \t]*,[ \t]*/);
  const name = offers.find((offer) => Object.hasOwn(subprotocols, offer));

  // The first line that holds is the answer. For a handshake see RFC 6455 section 4.2.1.
  const answers: [boolean, number, string, Record<string, string>?][] = [
    [!URL.canParse(url) || !/^[\w.:[\]-]*$/.test(get("host")), 400, "Bad URL or Host header."],
    [!/^(GET|HEAD)$/.test(method), 405, "Use GET.", { allow: "GET, HEAD" }],
    [!handshake && URL.parse(url)?.pathname !== "/", 404, "The page is at /."],
    [!handshake, 200, page.trimEnd(), html],
    [method !== "GET", 405, "A handshake uses GET.", { allow: "GET" }],
    [!get("host"), 400, "The Host header is missing."],
    [!upgrade, 400, "The header Upgrade: websocket is missing."],
    [!connection, 400, "The header Connection: Upgrade is missing."],
    [version !== "13", 426, "Sec-WebSocket-Version must be 13.", { "sec-websocket-version": "13" }],
    [!/^[A-Za-z0-9+/]{22}==$/.test(key), 400, "Sec-WebSocket-Key must be 16 bytes in base64."],
    [foreign, 403, "Pages of your origin may not connect."],
    [!name, 400, `Sec-WebSocket-Protocol must offer one of: ${Object.keys(subprotocols)}.`],
    [shared.connections.size >= limits.connections, 503, "Server full.", { "retry-after": "10" }],
  ];
  const [, status, text, more] = answers.find(([holds]) => holds) ?? [];
  if (!status) return new Connection(name!, shared.log ? peer() : "a client", shared);
  const base = { "content-type": "text/plain; charset=utf-8", "x-content-type-options": "nosniff" };
  return new Response(`${text}\n`, { status, headers: { ...base, ...more } });
}

/** A socket of Deno's, or one of Bun's, which has a function in place of `bufferedAmount`. */
type Socket = WebSocket & { getBufferedAmount?(): number };

/** One connection, the same on both runtimes. Subprotocols may `send` and `close`. */
export class Connection {
  #socket?: Socket; // from its opening to its end
  #handlers?: Handlers;
  #sent = 0; // sent since none was seen to be waiting
  #bytes = 0; // waiting when last looked, and sent since then

  constructor(readonly subprotocol: string, readonly peer: string, readonly shared: Shared) {}

  /**
   * Sends a message. Throws a TypeError if it is neither text nor bytes.
   *
   * Neither runtime can stop reading from a client that does not read itself. So what is sent is
   * counted, and looked at from time to time: a client with more waiting than `limits` allow is
   * closed (1008). Between two looks nobody knows what has left: then six times the bytes may pass.
   */
  send(message: Message): void {
    this.#bytes += typeof message === "string" ? message.length : Buffer.byteLength(message);
    this.#socket?.send(message);
    if (++this.#sent % (limits.unreadReplies >> 5) === 0) setTimeout(() => this.#look());
    if (this.#bytes > limits.unreadBytes) whenSent(() => this.#look());
    const many = this.#sent > limits.unreadReplies || this.#bytes > 6 * limits.unreadBytes;
    if (many) this.close(1008, "too many unread replies");
  }

  /** Looks how much waits. On Deno, empty messages never show. */
  #look(): void {
    if (!this.#socket || (this.#bytes === 0 && !onBun)) return;
    this.#bytes = this.#socket.getBufferedAmount?.() ?? this.#socket.bufferedAmount;
    if (this.#bytes === 0) this.#sent = 0;
    if (this.#bytes > limits.unreadBytes) this.close(1008, "too many unread replies");
  }

  /** Closes, with a code of RFC 6455 section 7.4 and a reason of at most 123 bytes. */
  close(code = 1000, reason = ""): void {
    if (Buffer.byteLength(reason) > 123) throw new RangeError("a reason has at most 123 bytes");
    const socket = this.#socket;
    // Deno loses a close frame if the next message is there already: except in a flood, it may come.
    if (code === 1008) socket?.close(code, reason);
    else setTimeout(() => socket?.close(code, reason));
    this.ended(code);
  }

  // What follows is called by the adapters below: `opened`, then `received` for each message, `ended`.

  opened(socket: Socket): void {
    this.#socket = socket;
    this.shared.connections.add(this);
    this.shared.log?.(() => `connected: ${this.peer}, ${this.subprotocol}`);
    if (this.shared.connections.size > limits.connections) return this.close(1013, "try later");
    socket.binaryType = "arraybuffer";
    const entry = subprotocols[this.subprotocol];
    if (typeof entry === "function") this.#handlers = { message: entry };
    else this.#attempt(() => this.#handlers = entry.open(this) ?? {});
  }

  received(data: string | ArrayBuffer): void {
    if (!this.#socket) return;
    const tooBig = !onBun && Buffer.byteLength(data) > limits.messageBytes; // Bun has looked itself
    if (tooBig) return this.close(1009, "message too big");
    const message = typeof data === "string" ? data : new Uint8Array(data);
    this.#attempt(() => {
      const reply = this.#handlers?.message?.(message);
      if (reply !== undefined) this.send(reply);
      this.shared.log?.(() => `received data: ${show(message)}, replying: ${show(reply)}`);
    });
  }

  /** A runtime may tell of one end twice. */
  ended(code: number): void {
    if (!this.shared.connections.delete(this)) return;
    this.#socket = undefined;
    this.shared.log?.(() => `closed: ${this.peer}, code ${code}`);
    // A moment later, for it may have been closed in `open`, before there were handlers.
    queueMicrotask(() => this.#attempt(() => this.#handlers?.close?.()));
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
// Each asks `answer` about a request: a Response is sent; for a Connection, the request is upgraded,
// and the connection told what happens to its socket.

/** The little of Bun's types that is needed. */
declare const Bun: { serve(options: object): { port: number; stop(now: boolean): Promise<void> } };
type Peer = { address: string; port: number } | null;
type BunServer = { upgrade(r: Request, how: object): boolean; requestIP(r: Request): Peer };
type BunSocket = Socket & { data: Connection };
const onBun = typeof Bun !== "undefined";

// Bun sends at once, so it can be seen at once what waits; Deno when the event loop turns.
const whenSent = onBun ? (look: () => void) => look() : setTimeout;

function listenDeno(shared: Shared): Server {
  const start = () => Deno.serve({ ...shared, onListen() {} }, handle);
  // It stops listening when file descriptors run out; then it tries until it can again.
  const again = (): Promise<void> => sleep(50).then(() => (server = start()).finished).catch(again);
  let server = start();
  server.finished.catch(again);
  shared.port = server.addr.port;
  return { port: shared.port, stop: () => server.shutdown() };

  function handle(request: Request, { remoteAddr }: Deno.ServeHandlerInfo<Deno.NetAddr>) {
    const connection = answer(request, () => place(remoteAddr.hostname, remoteAddr.port), shared);
    if (connection instanceof Response) return connection;
    // Deno looks for the subprotocol only among offers spelt "a, b": it is shown just this one.
    const { headers } = request, { get } = headers, protocol = connection.subprotocol;
    headers.get = (name) => /protocol$/i.test(name) ? protocol : get.call(headers, name);
    const how = { protocol, idleTimeout: limits.idleSeconds };
    const { socket, response } = Deno.upgradeWebSocket(request, how);
    socket.onopen = () => connection.opened(socket);
    socket.onmessage = ({ data }) => connection.received(data);
    socket.onclose = ({ code }) => connection.ended(code || 1006);
    return response;
  }
}

function listenBun(shared: Shared): Server {
  const websocket = {
    maxPayloadLength: limits.messageBytes,
    idleTimeout: limits.idleSeconds,
    open: (socket: BunSocket) => socket.data.opened(socket),
    message: (socket: BunSocket, data: string | ArrayBuffer) => socket.data.received(data),
    close: (socket: BunSocket, code: number, reason: string) =>
      socket.data.ended(code === 1006 && reason === "Received too big message" ? 1009 : code),
  };
  function fetch(request: Request, server: BunServer) {
    const from = () => server.requestIP(request);
    const connection = answer(request, () => place(from()?.address, from()?.port), shared);
    if (connection instanceof Response) return connection;
    const headers = { "sec-websocket-protocol": connection.subprotocol };
    server.upgrade(request, { headers, data: connection });
  }
  const server = Bun.serve({ ...shared, development: false, fetch, websocket });
  return { port: server.port, stop: () => server.stop(true) };
}

// ---- How it starts and stops --------------------------------------------------------------------

/** Options of {@linkcode serve}, as `--help` explains them; `cert` and `key` are PEM texts. */
export type Options = Partial<ReturnType<typeof parse>>;

/** A running server: the port it listens on; `stop` closes all connections (1001) first. */
export type Server = { port: number; stop(): Promise<void> };

/** Starts a server, by default on port 9000. Throws if it cannot listen. */
export function serve(options: Options = {}): Server {
  const { port = 9000, hostname = "0.0.0.0", reusePort = false, quiet } = options;
  const connections = new Set<Connection>(), shown = quiet ? undefined : log;
  const shared = { ...options, port, hostname, reusePort, connections, log: shown };
  const server = (onBun ? listenBun : listenDeno)(shared);
  const stop = async () => {
    for (const connection of connections) connection.close(1001, "the server is stopping");
    await Promise.race([server.stop(), sleep(limits.stopSeconds * 1000, 0, { ref: false })]);
    await sleep(150); // for what is on its way
  };
  return { port: server.port, stop };
}

// The log is written ten times a second, many lines at once; what is more than anybody can read, or
// the other end takes, is only counted. So it costs a busy server little, and never stops it.
const lines = Buffer.alloc(256 * 1024);
let used = 0, more = 0, written: Promise<unknown> = Promise.resolve();

function log(line: () => string): void {
  if (used === 0) written = Promise.all([written, sleep(100)]).then(flush);
  if (used < lines.length - 2000) used += lines.write(line() + "\n", used);
  else more++;
}

// `console.log` would block while nobody reads, and so would `write` on Deno.
async function flush(): Promise<void> {
  if (more > 0) used += lines.write(`(${more} more lines)\n`, used);
  const text = Buffer.from(lines.subarray(0, used));
  used = more = 0;
  await (onBun ? promisify(write)(1, text) : Deno.stdout.write(text)).catch(() => {});
}

/** A message as the log shows it: its first 80 characters, or the number of its bytes. */
function show(message: Message | void): string {
  if (typeof message !== "string") return message ? `${message.length} bytes` : "(nothing)";
  const start = [...message.slice(0, 160)].slice(0, 80).join("");
  return escape(start) + (start === message ? "" : `… (length ${message.length})`);
}

/** Client text must not steer the terminal, nor look like a line of the log. */
const escape = (text: string) => text.replace(/[\p{Cc}\p{Zl}\p{Zp}\p{Bidi_Control}]/gu, code);
const code = (c: string) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0");
const report = (where: string, error: unknown) =>
  console.error(`failed: ${where}\n${inspect(error)}`.split("\n").map(escape).join("\n  "));
const place = (host = "unknown", port = 0) => `${host.includes(":") ? `[${host}]` : host}:${port}`;

/** The options of the command line. */
const flags = {
  port: { type: "string", help: "N: listen on it; 0: on any free one (default: PORT, else 9000)" },
  hostname: { type: "string", default: "0.0.0.0", help: "NAME: listen there (default: 0.0.0.0)" },
  origin: { type: "string", multiple: true, help: "URL: let only its pages connect (repeatable)" },
  cert: { type: "string", help: "FILE: speak TLS; a PEM file (Deno: with --allow-read)" },
  key: { type: "string", help: "FILE: the key of the certificate, a PEM file" },
  "reuse-port": { type: "boolean", help: "share the port with other processes" },
  quiet: { type: "boolean", help: "log only errors" },
  help: { type: "boolean", help: "show this" },
} as const;

/** Reads the command line. Throws if it is wrong. */
function parse(args: string[]) {
  const { values: { "reuse-port": reusePort, ...values } } = parseArgs({ args, options: flags });
  const [cert, key] = [values.cert, values.key].map((file) => file && readFileSync(file, "utf8"));
  if (!cert !== !key || cert === "") throw new Error("--cert and --key go together, a file each");
  // Deno would stop and ask for leave to read PORT.
  const leave = () => Deno.permissions.querySync({ name: "env", variable: "PORT" }).state;
  const port = values.port ?? ((onBun || leave() === "granted") && process.env.PORT || "9000");
  if (!/^\d{1,5}$/.test(port) || +port > 65535) throw Error(`a port is 0 to 65535, not '${port}'`);
  return { ...values, port: Number(port), cert, key, reusePort };
}

/** Runs until a signal; a second one ends it at once. */
function main(args: string[]): void {
  const help = Object.entries(flags).map(([name, { help }]) => `  --${name.padEnd(12)}${help}\n`);
  if (args.includes("--help")) return console.log(`Reverses each message.\n\n${help.join("")}`);
  const options = parse(args), server = serve(options);
  let signals = 0;
  const end = () => signals++ ? process.exit(1) : server.stop().then(() => process.exit(0));
  process.on("SIGINT", end).on("SIGTERM", end);
  process.on("uncaughtException", (error) => report("uncaughtException", error));
  process.on("unhandledRejection", (error) => report("unhandledRejection", error));
  const host = place(options.hostname.replace(/^(0\.0\.0\.0|::|)$/, "localhost"), server.port);
  console.log(`Listening on http${options.cert ? "s" : ""}://${host}/`);
}

if (import.meta.main) {
  try {
    main(process.argv.slice(2));
  } catch (error) {
    const { code, message } = error as Error & { code?: string };
    const why = code === "EADDRINUSE" ? "the port is in use, try another --port" : message;
    console.error(`Cannot start: ${why.split("\n")[0]} (see --help)`);
    process.exit(1);
  }
}
