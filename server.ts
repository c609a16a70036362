/**
 * A WebSocket server for Deno and Bun. It speaks several subprotocols; the first of them,
 * dumb-increment-protocol, answers each message with the message reversed.
 *
 * A request becomes a page, a refusal or a handshake. The runtime upgrades the handshake to a
 * WebSocket. A connection gives each message to its subprotocol and sends the reply. Most of the
 * rest protects the server and its clients from each other.
 *
 * For the idea alone, read part 1, `answer` in part 3, `received` in part 4, and part 5 or 6 up to
 * its class: there, requests are upgraded and messages arrive.
 *
 * The parts: 1 the subprotocols; 2 `serve`, its options and limits; 3 the request; 4 the connection;
 * 5 Deno; 6 Bun; 7 the log, the command line and the checks of the options; 8 the subprotocol
 * on-demand; 9 how a message is reversed; 10 the start, if this file is run as a program.
 */
import { Buffer } from "node:buffer";
import { hash } from "node:crypto";
import { readFileSync } from "node:fs";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { inspect, parseArgs } from "node:util";
import indexHtml from "./index.html" with { type: "text" };

// ---- 1. The subprotocols ------------------------------------------------------------------------
// Many subprotocols live on one port, each independent of the others. A client names the one that
// it wants to speak. A subprotocol is a function: it is called with each new connection and returns
// the message handler, the function that answers the messages of this connection.

/** The text of a text message, or the bytes of a binary message. */
export type Message = string | Uint8Array<ArrayBuffer>;

/** Returns the reply to a message, or nothing. If it is async, replies are sent when ready. */
export type MessageHandler = (message: Message) => Message | void | Promise<Message | void>;

/**
 * Is called once for each new connection, and must not be async. Returns the message handler, or
 * nothing if messages need no answer. If it or the handler throws, the connection is closed with
 * 1011. An exception in a timer is not caught here; `main` in part 7 logs it and goes on.
 */
export type Subprotocol = (connection: Connection, handshake: Handshake) => MessageHandler | void;

/**
 * The subprotocols by name. To add one, add an entry. An entry such as `() => reverse` uses one
 * handler for all connections; `count` makes one for each connection, which remembers something.
 */
export const subprotocols: Record<string, Subprotocol> = {
  "dumb-increment-protocol": () => reverse, // the odd name is from a tutorial, see README.md
  "echo": () => (message) => message,
  "count": count,
  "chat": chat,
  "on-demand": onDemand, // part 8; for tests of clients and proxies
};

/** Sends "1", "2", "3", one a second. The message "reset" makes it start again. */
function count(connection: Connection): MessageHandler {
  let seconds = 0; // a variable in here belongs to one connection
  const timer = setInterval(() => {
    seconds++;
    connection.send(String(seconds));
  }, 1000);
  connection.onclose = () => clearInterval(timer);
  return (message) => {
    if (message === "reset") seconds = 0;
  };
}

const chatMembers = new Set<Connection>(); // a variable out here is shared by all connections
/** Sends each message to everybody who speaks "chat", its sender too. */
function chat(connection: Connection): MessageHandler {
  chatMembers.add(connection);
  connection.onclose = () => chatMembers.delete(connection);
  return (message) => chatMembers.forEach((member) => member.send(message));
}

// ---- 2. serve, its options and limits -----------------------------------------------------------

/** The options of {@linkcode serve}. */
export interface Options {
  /** The port to listen on, 0 to 65535. 0 is any free one. Default: 9000. */
  port?: number;
  /** The name or IP address to listen on. Default: 0.0.0.0, all of IPv4. "::": IPv4 and IPv6. */
  hostname?: string;
  /** Whether other processes may listen on the same port (Linux). Default: false. */
  reusePort?: boolean;
  /** A certificate in PEM, so that the server speaks TLS. Default: none. */
  cert?: string;
  /** The private key of the certificate in PEM. Default: none. */
  key?: string;
  /** The origins whose pages may connect. Clients without an Origin header may. Default: all. */
  origins?: string[];
  /** The subprotocol for clients that offer none. Default: none; such clients are refused. */
  defaultSubprotocol?: string;
  /** Whether only errors are logged. Default: false. */
  quiet?: boolean;
  /** The subprotocols to speak. Default: {@linkcode subprotocols}. */
  subprotocols?: Record<string, Subprotocol>;
  /** The limits that differ from {@linkcode limits}. */
  limits?: Partial<Limits>;
}

/** The default limits. `limitRanges` (part 7) says which values are allowed. */
export const limits = {
  /** The longest message, in bytes (of text: of UTF-8). A longer one closes with 1009. */
  messageBytes: 1024 * 1024,
  /** The memory of one client's unread messages, in bytes. Over it, `send` closes with 1008. */
  unreadBytes: 20 * 1024 * 1024,
  /** The same for all clients. Over it, `send` closes its client if that has over 64 KiB unread. */
  allUnreadBytes: 96 * 1024 * 1024,
  /** How many connections there may be. Further handshakes are refused with 503. */
  connections: 10_000,
  /**
   * A connection is ended after so many seconds without a whole message or a pong of the client. The
   * server sends a ping after half of the time. A frame must arrive within the other half: 1 MiB in
   * 54 s is 155 kbit/s.
   */
  idleSeconds: 108,
  /** How many seconds a stopping server waits for its connections to end. */
  stopSeconds: 1,
};

export type Limits = typeof limits;

/** A running server. */
export interface Server {
  /** The port on which it listens. */
  readonly port: number;
  /** Closes all connections with 1001, waits up to `limits.stopSeconds`, and frees the port. */
  stop(): Promise<void>;
}

/** What the requests and the connections of one server share. */
interface ServerState {
  readonly options: ReturnType<typeof completeOptions>;
  readonly connections: Set<Connection>; // also those that are closed but still take memory
  readonly log?: (makeLine: () => string) => void; // undefined if the server is quiet
  allUnreadMemory: number; // the memory of all clients' unread messages, when last measured, bytes
  measuredTime: number; // when that was, by performance.now(), milliseconds
  isStopping: boolean;
}

const listen = typeof Bun === "undefined" ? listenOnDeno : listenOnBun; // parts 5 and 6

/** Starts a server. Throws an Error if it cannot listen, or if an option is wrong. */
export function serve(givenOptions: Options = {}): Server {
  const options = completeOptions(givenOptions);
  const state: ServerState = {
    options,
    connections: new Set(),
    log: options.quiet ? undefined : printLine,
    allUnreadMemory: 0,
    measuredTime: -Infinity,
    isStopping: false,
  };
  const server = tryToListen(state);
  return { port: server.port, stop: () => stopServer(server, state) };
}

function tryToListen(state: ServerState): Server {
  const { hostname, port, cert } = state.options;
  try {
    return listen(state);
  } catch (error) {
    const { code, message } = error as Error & { code?: string };
    if (code === "EADDRINUSE") throw new Error(`port ${port} is in use; try another options.port`);
    const suspects = cert ? "options.cert and options.key" : "options.hostname and options.port";
    throw new Error(`cannot listen on ${hostPort(hostname, port)}: ${message}; check ${suspects}`);
  }
}

async function stopServer(server: Server, state: ServerState): Promise<void> {
  state.isStopping = true;
  for (const connection of state.connections) connection.close(1001, STOP_REASON);
  const deadline = performance.now() + state.options.limits.stopSeconds * 1000;
  while (state.connections.size > 0 && performance.now() < deadline) await sleep(10);
  // Deno would wait for ever for a client that does not finish its request.
  await Promise.race([server.stop(), sleep(100)]);
}

// ---- 3. How a request becomes a page, a refusal or a handshake ----------------------------------
// A WebSocket begins with an HTTP request, the handshake. The server answers it with status 101,
// and from then on the two sides exchange messages over the same TCP connection. The handshake is
// checked here, before the runtime looks at it, so that Deno and Bun refuse the same with the same
// words. (A few requests never come here, because a runtime refuses them itself; see README.md.)

/** What a client sent to begin its connection. A proxy on the way may have changed it. */
export interface Handshake {
  /** The IP address and port of the client or, behind a proxy, of the proxy. */
  readonly address: string;
  readonly subprotocolName: string;
  /** Whether the client has offered it. Else it is the default, and the answer must not name it. */
  readonly isOffered: boolean;
  /** The URL, which the runtime makes of the request line and the Host header. */
  readonly url: string;
  readonly headers: Headers;
}

/** Answers a request: with a page, a refusal, or the handshake if the request is to be upgraded. */
function answer(request: Request, address: string, state: ServerState): Response | Handshake {
  const { options } = state;
  const { method, headers } = request;
  const header = (name: string) => headers.get(name) ?? "";

  // Browsers do not say why a handshake was refused, so the log does.
  function refuse(status: number, reason: string, moreHeaders?: Record<string, string>): Response {
    state.log?.(() => `${address} refused with ${status}: ${reason}`);
    return textResponse(status, reason, moreHeaders);
  }

  // Without a Host header, Bun's URL is only a path. A Host such as "a/b" would change the path.
  const url = URL.parse(request.url, "http://localhost");
  const isHostValid = /^[\w.:[\]-]*$/.test(header("host")); // also true without a Host header
  if (!url || !isHostValid) return refuse(400, "The URL or the Host header is not valid.");

  // Either header marks a handshake. If a proxy has removed the other, a refusal below says so.
  const isUpgrade = parseList(header("upgrade").toLowerCase()).includes("websocket");
  if (!isUpgrade && !headers.has("sec-websocket-key")) {
    const isAllowed = method === "GET" || method === "HEAD";
    if (!isAllowed) return textResponse(405, "Use GET.", { allow: "GET, HEAD" });
    if (!url.pathname.endsWith("/")) return textResponse(404, "Only the page is here, at /.");
    return new Response(page, { headers: pageHeaders }); // both are at the end of this part
  }

  // For tests of clients: a handshake to "/?status=503" is refused with 503.
  const status = url.searchParams.get("status") ?? "";
  if (/^[45]\d\d$/.test(status)) return refuse(Number(status), "The URL asks for this status.");

  // RFC 6455 section 4.2.1 says what a handshake must contain.
  if (method !== "GET") return refuse(405, "A handshake must use GET.", { allow: "GET" });
  if (!isUpgrade) {
    const hint = "WebSockets need HTTP/1.1 (for curl: --http1.1).";
    return refuse(400, `The header Upgrade: websocket is missing. ${hint}`);
  }
  if (!header("host")) return refuse(400, "The Host header is missing.");
  if (!parseList(header("connection").toLowerCase()).includes("upgrade")) {
    return refuse(400, "The header Connection: Upgrade is missing.");
  }
  if (headers.has("transfer-encoding") || Number(header("content-length")) !== 0) {
    return refuse(400, "A handshake must not have a body.");
  }
  const origin = headers.get("origin");
  if (options.origins && origin !== null && !options.origins.includes(origin)) {
    return refuse(403, "Pages of this origin may not connect.");
  }
  // The first offer that the server speaks, compared exactly, or the default if nothing is offered.
  const offers = header("sec-websocket-protocol");
  const isOffered = offers !== "";
  const subprotocolName = isOffered
    ? parseList(offers).find((name) => Object.hasOwn(options.subprotocols, name))
    : options.defaultSubprotocol;
  if (!subprotocolName) {
    const names = Object.keys(options.subprotocols).join(", ");
    const hint = "(--default NAME serves clients that offer none.)";
    return refuse(400, `Sec-WebSocket-Protocol must offer one of: ${names}. ${hint}`);
  }
  if (header("sec-websocket-version") !== "13") {
    // Asked for by RFC 6455 section 4.2.2, and by RFC 9110 section 15.5.22.
    const wanted = { "sec-websocket-version": "13", upgrade: "websocket", connection: "Upgrade" };
    return refuse(426, "Sec-WebSocket-Version must be 13.", wanted);
  }
  if (!/^[A-Za-z0-9+/]{22}==$/.test(header("sec-websocket-key"))) {
    return refuse(400, "Sec-WebSocket-Key must be 16 bytes in base64.");
  }
  const retryLater = { "retry-after": "10" }; // seconds
  if (state.isStopping) return refuse(503, "The server is about to stop.", retryLater);
  const isFull = state.connections.size >= options.limits.connections;
  if (isFull) return refuse(503, "The server is full.", retryLater);

  return { address, subprotocolName, isOffered, url: url.href, headers };
}

/** Returns the items of a header that is a list with commas (RFC 9110 section 5.6.1). */
function parseList(header: string): string[] {
  // HTTP allows blanks and tabs around an item. `trim` would also remove a no-break space, and a
  // regular expression would take very long for a header of many blanks.
  const trimBlanks = (item: string) => item.includes("\xa0") ? item : item.trim();
  return header.split(",").map(trimBlanks).filter((item) => item !== "");
}

function textResponse(status: number, text: string, moreHeaders?: Record<string, string>) {
  const headers = {
    "content-type": "text/plain; charset=utf-8",
    "x-content-type-options": "nosniff",
    ...moreHeaders,
  };
  return new Response(`${text}\n`, { status, headers });
}

// Browsers hash the style and the script with LF line ends, even if the file has CR LF.
const page = indexHtml.replaceAll("\r\n", "\n");

const pageHeaders = {
  "content-type": "text/html; charset=utf-8",
  "x-content-type-options": "nosniff",
  // The page may use its own style and script, show images that are in it, and open WebSockets.
  "content-security-policy": [
    "default-src 'none'",
    `style-src ${contentHash("style")}`,
    `script-src ${contentHash("script")}`,
    "img-src data:",
    "connect-src ws: wss:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
  ].join("; "),
};

/** Returns the hash of the page's only style or script, as a Content-Security-Policy writes it. */
function contentHash(element: "style" | "script"): string {
  const start = page.indexOf(">", page.indexOf(`<${element}`)) + 1;
  const content = page.slice(start, page.indexOf(`</${element}>`));
  return `'sha256-${hash("sha256", content, "base64")}'`;
}

// ---- 4. A connection: what is the same on both runtimes -----------------------------------------
// Messages to a client that does not read wait in the server's memory; here they are called unread.
// To stop reading from such a client until it has caught up is called backpressure. Bun can do it,
// Deno cannot (parts 5 and 6). On both, `send` closes a client that has left too much unread.
//
// A connection is open until the client or the server closes it. From then on its subprotocol can
// send nothing and receives nothing, but what is unread is still delivered, if the client reads.

/** A client may always have this much unread. With more, Bun stops reading from it. */
const SMALL_UNREAD_BYTES = 64 * 1024;

/** Roughly how much memory Deno needs for an unread message, besides its bytes. Bun needs little. */
const MESSAGE_OVERHEAD_BYTES = 1024;

const UNREAD_REASON = "too many unread messages";
const STOP_REASON = "the server is stopping";

/** One connection with a client. `DenoConnection` and `BunConnection` add what differs. */
export abstract class Connection {
  /** Is called once, soon after either side has closed. Set it before the subprotocol returns. */
  onclose?: () => void;
  readonly subprotocolName: string;
  readonly address: string; // of the client or, behind a proxy, of the proxy
  /** The memory of what this client has not read, in bytes. */
  abstract readonly unreadMemory: number;
  /** Sends a message, or lets it wait. Returns false if the client has begun to close. */
  protected abstract write(message: Message): boolean;
  /** Sends a close frame after the unread messages. Returns at once. */
  protected abstract writeClose(code: number, reason: string): void;

  readonly #state: ServerState;
  #handler: MessageHandler | void = undefined;
  #isOpen = true;

  constructor({ address, subprotocolName }: Handshake, state: ServerState) {
    this.address = address;
    this.subprotocolName = subprotocolName;
    this.#state = state;
  }

  /** The limits of the server. */
  get limits(): Readonly<Limits> {
    return this.#state.options.limits;
  }

  /**
   * Sends a message, if the connection is open. A client that has left more unread than `limits`
   * allow is closed with 1008 instead. Throws a TypeError if it is neither string nor Uint8Array.
   */
  send(message: Message): void {
    if (typeof message !== "string" && !(message instanceof Uint8Array)) {
      throw new TypeError("a message must be a string or a Uint8Array");
    }
    if (!this.#isOpen) return;
    if (this.#hasTooMuchUnread()) return this.close(1008, UNREAD_REASON);
    const isSent = this.write(message);
    if (isSent) this.#log(() => `sent ${preview(message)}`);
  }

  /** Closes the connection. Throws a RangeError if a close frame cannot hold code or reason. */
  close(code = 1000, reason = ""): void {
    checkClose(code, reason);
    if (!this.#isOpen) return;
    this.#markClosed(code, reason);
    this.writeClose(code, reason);
  }

  /** The handshake is done. The runtime's part calls this, `received` and `ended`. */
  opened(handshake: Handshake): void {
    const { connections, options, isStopping } = this.#state;
    connections.add(this);
    this.#log(() => `connected, ${this.subprotocolName}`);
    if (isStopping) return this.close(1001, STOP_REASON);
    // Many handshakes at once may have passed `answer` before the first of them opened.
    if (connections.size > options.limits.connections) return this.close(1013, "try again later");
    try {
      const handler = options.subprotocols[this.subprotocolName](this, handshake);
      if (handler !== undefined && typeof handler !== "function") {
        // If it is a promise that is rejected, nobody else would catch that.
        Promise.resolve(handler).catch((error) => this.#report(error));
        throw new TypeError("a subprotocol must return a function or nothing, and not be async");
      }
      this.#handler = handler;
    } catch (error) {
      this.#fail(error);
    }
  }

  /** A whole message has arrived. */
  received(message: Message): void {
    if (!this.#isOpen) return;
    this.#log(() => `received ${preview(message)}`);
    try {
      const reply = this.#handler?.(message);
      if (reply instanceof Promise) {
        reply.then((result) => this.#reply(result)).catch((error) => this.#fail(error));
      } else {
        this.#reply(reply);
      }
    } catch (error) {
      this.#fail(error);
    }
  }

  /** The connection has ended. If the runtime may still keep much, count that for `idleSeconds`. */
  async ended(code: number, reason: string): Promise<void> {
    if (this.#isOpen) this.#markClosed(code, reason);
    const isMuchUnread = this.unreadMemory > SMALL_UNREAD_BYTES;
    if (isMuchUnread) await sleep(this.limits.idleSeconds * 1000, undefined, { ref: false });
    this.#state.connections.delete(this);
  }

  #reply(reply: Message | void): void {
    if (reply !== undefined) this.send(reply);
  }

  #hasTooMuchUnread(): boolean {
    const { unreadMemory } = this;
    if (unreadMemory > this.limits.unreadBytes) return true;
    if (unreadMemory <= SMALL_UNREAD_BYTES) return false;
    return measureAllUnread(this.#state) > this.limits.allUnreadBytes;
  }

  #markClosed(code: number, reason: string): void {
    this.#isOpen = false;
    this.#log(() => `closed with ${code}${reason && `: ${quote(reason)}`}`);
    // Not at once, since a subprotocol's function may first call `close` and then set `onclose`.
    Promise.resolve()
      .then(() => this.onclose?.())
      .catch((error) => this.#report(error));
  }

  /** An error in a subprotocol ends its connection and nothing else. */
  #fail(error: unknown): void {
    this.#report(error);
    this.close(1011, "internal error");
  }

  #report(error: unknown): void {
    report(`${this.address} failed in ${this.subprotocolName}`, error);
  }

  #log(makeText: () => string): void {
    this.#state.log?.(() => `${this.address} ${makeText()}`);
  }
}

/** Returns the memory of all clients' unread messages, in bytes. Measures once in 10 ms. */
function measureAllUnread(state: ServerState): number {
  const now = performance.now();
  if (now - state.measuredTime >= 10) {
    state.measuredTime = now;
    state.allUnreadMemory = 0;
    for (const { unreadMemory } of state.connections) state.allUnreadMemory += unreadMemory;
  }
  return state.allUnreadMemory;
}

/** Throws if a close frame may not hold the code or the reason (RFC 6455 sections 7.4 and 5.5). */
function checkClose(code: number, reason: string): void {
  const isRegistered = (code >= 1000 && code <= 1003) || (code >= 1007 && code <= 1014); // at IANA
  const isPrivate = code >= 3000 && code <= 4999;
  if (!Number.isInteger(code) || !(isRegistered || isPrivate)) {
    throw new RangeError("a close code must be 1000 to 1003, 1007 to 1014 or 3000 to 4999");
  }
  if (Buffer.byteLength(reason) > 123) {
    throw new RangeError("a close reason must have at most 123 bytes in UTF-8");
  }
}

// ---- 5. Deno ------------------------------------------------------------------------------------

function listenOnDeno(state: ServerState): Server {
  const { port, hostname, reusePort, cert, key } = state.options;
  let isStopped = false;
  let hasFailed = false; // since the last request; so that a failure to listen is told once
  let server = startListening(port);

  function handleRequest(request: Request, info: Deno.ServeHandlerInfo<Deno.NetAddr>): Response {
    if (hasFailed) {
      hasFailed = false;
      printError(() => "listening again");
    }
    const address = hostPort(info.remoteAddr.hostname, info.remoteAddr.port);
    const result = answer(request, address, state);
    if (result instanceof Response) return result;
    const { socket, response } = upgradeOnDeno(request, result, state.options.limits);
    socket.addEventListener("open", () => connectOnDeno(socket, result, state), { once: true });
    return response;
  }

  function startListening(port: number): Deno.HttpServer<Deno.NetAddr> {
    const onListen = () => {}; // without it, Deno prints a line of its own
    const denoOptions = { port, hostname, reusePort, cert, key, onListen };
    const newServer = Deno.serve(denoOptions, handleRequest);
    // Deno stops listening when no file descriptors are left. Open connections go on.
    newServer.finished.catch((error) => {
      if (!hasFailed) printError(() => `stopped listening: ${error.message}; see ulimit -n`);
      hasFailed = true;
      listenAgain();
    });
    return newServer;
  }

  /** Tries until it can listen, or until the server is stopped. */
  async function listenAgain(): Promise<void> {
    await sleep(50);
    if (isStopped) return;
    try {
      server = startListening(server.addr.port);
    } catch { // Most often, no file descriptor is free yet.
      listenAgain();
    }
  }

  function stop(): Promise<void> {
    isStopped = true;
    return server.shutdown();
  }

  return { port: server.addr.port, stop }; // if the option was 0, this is the port that was free
}

/**
 * Upgrades a request and names the subprotocol in the response. In Deno 2.9, its header can be set.
 * Deno 2.5, the version that Deno Deploy documents, has only the option `protocol`, which works if
 * the offers are separated by ", ", as browsers do. When Deno Deploy has 2.9, that option can go.
 */
function upgradeOnDeno(request: Request, handshake: Handshake, { idleSeconds }: Limits) {
  const { subprotocolName, isOffered, headers } = handshake;
  const isListed = headers.get("sec-websocket-protocol")?.split(", ").includes(subprotocolName);
  const protocol = isListed ? subprotocolName : undefined;
  const upgrade = Deno.upgradeWebSocket(request, { protocol, idleTimeout: idleSeconds });
  try {
    if (isOffered) upgrade.response.headers.set("sec-websocket-protocol", subprotocolName);
  } catch { // Deno 2.5
  }
  return upgrade;
}

/** A WebSocket has opened. It has listeners, since onmessage, onclose and onerror take 1 KB more. */
function connectOnDeno(socket: WebSocket, handshake: Handshake, state: ServerState): void {
  const { messageBytes } = state.options.limits;
  const connection = new DenoConnection(socket, handshake, state);
  let problem = "";
  socket.addEventListener("message", ({ data }: MessageEvent<string | ArrayBuffer>) => {
    // Deno itself has no limit, so the whole message is in memory by now.
    const isTooBig = Buffer.byteLength(data) > messageBytes;
    if (isTooBig) connection.close(1009, "message too big");
    else connection.received(typeof data === "string" ? data : new Uint8Array(data));
  });
  socket.addEventListener("error", (event) => problem = (event as ErrorEvent).message);
  socket.addEventListener("close", ({ code, reason }) => {
    connection.ended(code || 1006, reason || problem); // 0 is an end without a close frame
  }, { once: true }); // Deno may report the end twice
  connection.opened(handshake);
}

/**
 * Deno reads all that a client sends, and keeps all that the client does not read. It reports how
 * many bytes are unread, but not in how many messages. Messages leave in order, so a message has
 * been read when `#readBytes` has reached its end.
 */
class DenoConnection extends Connection {
  readonly #socket: WebSocket;
  #sentBytes = 0; // since the connection opened
  #readBytes = 0; // of these, when last measured
  readonly #messageEnds: number[] = []; // #sentBytes after each message that is unread
  #keepsUnread = false; // Deno keeps messages that were unread when it was told to close

  constructor(socket: WebSocket, handshake: Handshake, state: ServerState) {
    super(handshake, state);
    this.#socket = socket;
  }

  override get unreadMemory(): number {
    const { readyState, bufferedAmount } = this.#socket;
    if (readyState === WebSocket.CLOSED && !this.#keepsUnread) return 0;
    // After a close frame in either direction, Deno reports 0 although messages may be unread.
    if (readyState === WebSocket.OPEN) this.#readBytes = this.#sentBytes - bufferedAmount;
    const ends = this.#messageEnds;
    while (ends.length > 0 && ends[0] <= this.#readBytes) ends.shift();
    const payloadBytes = this.#sentBytes - this.#readBytes;
    return payloadBytes + ends.length * MESSAGE_OVERHEAD_BYTES;
  }

  /** Only bytes after an empty message can show that it was read, so it ends one byte further. */
  protected override write(message: Message): boolean {
    if (this.#socket.readyState !== WebSocket.OPEN) return false;
    const length = Buffer.byteLength(message);
    this.#sentBytes += length;
    this.#messageEnds.push(length === 0 ? this.#sentBytes + 1 : this.#sentBytes);
    this.#socket.send(message);
    return true;
  }

  /**
   * Once Deno has been told to close, it cuts the connection at the next message that arrives. So
   * the close frame waits until the client has read everything and sends nothing. It waits half a
   * second longer each time that the client reads something, and no longer than `idleSeconds`.
   */
  protected override async writeClose(code: number, reason: string): Promise<void> {
    const socket = this.#socket;
    const patience = 500; // milliseconds
    const lastDeadline = performance.now() + this.limits.idleSeconds * 1000;
    let deadline = performance.now() + patience;
    let isClientSending = false;

    const sendCloseFrame = () => {
      if (socket.readyState !== WebSocket.OPEN) return; // sent already, or the client has left
      this.#keepsUnread = this.unreadMemory > 0;
      socket.close(code, reason);
    };
    socket.addEventListener("message", () => {
      isClientSending = true;
      // A flood may leave Deno no time for timers, so the deadline is checked here, too.
      if (performance.now() > deadline) sendCloseFrame();
    });
    while (performance.now() < deadline) {
      const unreadBefore = socket.bufferedAmount;
      isClientSending = false;
      await sleep(20);
      const unread = socket.bufferedAmount;
      if (unread === 0 && !isClientSending) break;
      if (unread < unreadBefore) deadline = Math.min(performance.now() + patience, lastDeadline);
    }
    sendCloseFrame();
  }
}

// ---- 6. Bun -------------------------------------------------------------------------------------

function listenOnBun(state: ServerState): Server {
  const { port, hostname, reusePort, cert, key, limits } = state.options;
  const hasTls = cert !== undefined;

  function handleRequest(request: Request, server: BunServer): Response | undefined {
    const client = server.requestIP(request);
    const result = answer(request, hostPort(client?.address, client?.port), state);
    if (result instanceof Response) return result;
    const { subprotocolName, isOffered } = result;
    const headers = isOffered ? { "sec-websocket-protocol": subprotocolName } : undefined;
    if (server.upgrade(request, { headers, data: result })) return undefined; // Bun has answered
    return textResponse(400, "Bun has refused the handshake."); // never seen: `answer` is stricter
  }

  const server = Bun.serve({
    port,
    hostname,
    reusePort,
    tls: hasTls ? { cert, key } : undefined,
    http2: hasTls, // for the page; Deno speaks HTTP/2 over TLS by itself
    development: false, // no error page that shows source code
    fetch: handleRequest,
    websocket: {
      maxPayloadLength: limits.messageBytes,
      // This ends connections that are closed but stay. `checkLife` ends silent open ones earlier.
      idleTimeout: Math.min(2 * limits.idleSeconds, 960),
      sendPings: false, // `checkLife` sends them
      backpressureLimit: 0, // no limit: over it, Bun would silently drop messages
      open(socket) {
        const handshake = socket.data as Handshake;
        const connection = new BunConnection(socket, handshake, state);
        socket.data = connection; // for the next events
        connection.opened(handshake);
      },
      message: (socket, message) => socket.data.received(message),
      ping: (socket) => socket.data.hasShownLife(),
      pong: (socket) => socket.data.hasShownLife(),
      drain: (socket) => socket.data.drained(),
      close: (socket, code, reason) => socket.data.ended(code, reason),
    },
  });
  const lifeTimer = setInterval(() => {
    for (const connection of state.connections) {
      if (connection instanceof BunConnection) connection.checkLife();
    }
  }, limits.idleSeconds * 1000 / 4);

  function stop(): Promise<void> {
    clearInterval(lifeTimer);
    return server.stop(true);
  }

  return { port: server.port, stop };
}

/**
 * Bun can pause: it stops reading from a client until the client has read its replies, so that
 * these do not pile up. Besides its bytes, an unread message takes too little memory to count.
 */
class BunConnection extends Connection {
  readonly #socket: BunSocket;
  #measuredMemory = 0; // what was unread after the last message was sent, or some were read
  #heldMessages?: Message[]; // during a pause: those that Bun had read before
  #silentChecks = 0; // since the last sign of life

  constructor(socket: BunSocket, handshake: Handshake, state: ServerState) {
    super(handshake, state);
    this.#socket = socket;
    socket.binaryType = "uint8array";
  }

  override get unreadMemory(): number {
    // After a close frame of either side, Bun reports 0 although it keeps what is unread.
    const isOpen = this.#socket.readyState === WebSocket.OPEN;
    if (isOpen) this.#measuredMemory = this.#socket.getBufferedAmount();
    return this.#measuredMemory;
  }

  protected override write(message: Message): boolean {
    if (this.#socket.readyState !== WebSocket.OPEN) return false;
    this.#socket.send(message);
    this.#pauseIfBehind();
    return true;
  }

  /** Bun reports the end at once, even if the client reads nothing and the close frame waits. */
  protected override writeClose(code: number, reason: string): void {
    this.#socket.close(code, reason);
  }

  /** Bun has read up to 512 KiB before a pause. These messages are held until it is over. */
  override received(message: Message): void {
    this.#silentChecks = 0;
    if (this.#heldMessages) this.#heldMessages.push(message);
    else super.received(message);
  }

  /** The client has read some of what was unread. Bun delivers no new message before this returns. */
  drained(): void {
    this.#silentChecks = 0;
    this.#socket.resume();
    this.#receiveHeldMessages();
  }

  /** The client may have closed during a pause. What it sent before is received now. */
  override ended(code: number, reason: string): Promise<void> {
    this.#receiveHeldMessages();
    if (code === 1006) this.#measuredMemory = 0; // TCP has ended, and Bun has freed it
    return super.ended(sentCloseCode(code, reason), reason);
  }

  hasShownLife(): void {
    this.#silentChecks = 0;
  }

  /**
   * Is called four times in `idleSeconds`, since Bun's own timeout pauses with the connection and
   * starts anew at each send. Checks are counted, not seconds, so that a process that was stopped
   * for a while does not end everybody.
   */
  checkLife(): void {
    if (this.#socket.readyState !== WebSocket.OPEN) return;
    this.#silentChecks++;
    if (this.#silentChecks === 2) this.#socket.ping();
    if (this.#silentChecks <= 4) return;
    if (this.unreadMemory > 0) return this.close(1008, UNREAD_REASON);
    this.ended(1006, "no sign of life"); // now, so that the log tells this reason
    this.#socket.terminate();
  }

  #pauseIfBehind(): void {
    if (this.unreadMemory <= SMALL_UNREAD_BYTES) return;
    if (this.#socket.readyState !== WebSocket.OPEN) return;
    this.#heldMessages ??= [];
    // A bug in Bun 1.4.5: once the client has read a part, Bun reads from it again, but pause()
    // does nothing without resume(). When the bug is fixed, resume() can go.
    this.#socket.resume();
    this.#socket.pause();
  }

  /** Ends a pause. If the client has read too little, or at a new pause, the rest is held again. */
  #receiveHeldMessages(): void {
    const messages = this.#heldMessages ?? [];
    this.#heldMessages = undefined;
    this.#pauseIfBehind();
    for (const message of messages) this.received(message);
  }
}

/** After an error of the client, Bun reports 1006 and a reason, but has sent another code. */
function sentCloseCode(code: number, reason: string): number {
  if (code !== 1006 || !reason.startsWith("Received ")) return code;
  if (reason === "Received too big message") return 1009;
  if (reason === "Received invalid UTF-8") return 1007;
  return 1002;
}

/** Bun's own types, as far as they are needed here. */
declare const Bun: { serve(options: BunOptions): BunServer };

interface BunOptions {
  port: number;
  hostname: string;
  reusePort: boolean;
  tls?: { cert?: string; key?: string };
  http2: boolean;
  development: boolean;
  fetch(request: Request, server: BunServer): Response | undefined;
  websocket: {
    maxPayloadLength: number;
    idleTimeout: number;
    sendPings: boolean;
    backpressureLimit: number;
    open(socket: BunSocket<Handshake | BunConnection>): void;
    message(socket: BunSocket<BunConnection>, message: Message): void;
    ping(socket: BunSocket<BunConnection>): void;
    pong(socket: BunSocket<BunConnection>): void;
    drain(socket: BunSocket<BunConnection>): void;
    close(socket: BunSocket<BunConnection>, code: number, reason: string): void;
  };
}

interface BunServer {
  readonly port: number;
  stop(closeNow: boolean): Promise<void>;
  upgrade(request: Request, options: { headers?: HeadersInit; data: Handshake }): boolean;
  requestIP(request: Request): { address: string; port: number } | null;
}

interface BunSocket<Data = unknown> {
  data: Data; // what `upgrade` was given, and from `open` on, the connection
  readonly readyState: number;
  binaryType: string;
  send(message: Message): number;
  ping(): number;
  close(code: number, reason: string): void;
  terminate(): void;
  getBufferedAmount(): number;
  pause(): void;
  resume(): void;
}

// ---- 7. The log, the command line, the checks of the options ------------------------------------
// The log shows at most 100 lines in a tenth of a second, more than anybody can read, and counts
// the rest, so that a flood of messages costs little. It goes through `console`, because Deno
// Deploy and debuggers see nothing else.

const printLine = linePrinter(console.log);
const printError = linePrinter(console.error);

/** Returns a function that prints a line, or only counts it if there are too many. */
function linePrinter(print: (line: string) => void): (makeLine: () => string) => void {
  let lineCount = 0; // in this tenth of a second
  function printSafely(makeLine: () => string): void {
    try {
      print(makeLine());
    } catch { // The disk is full, or an error cannot be shown. That must not end the server.
    }
  }

  function startNextTenth(): void {
    const skippedCount = lineCount - 100;
    if (skippedCount > 0) printSafely(() => `(${skippedCount} more lines)`);
    lineCount = 0;
  }

  return (makeLine) => {
    if (lineCount === 0) setTimeout(startNextTenth, 100);
    lineCount++;
    if (lineCount <= 100) printSafely(makeLine);
  };
}

/** Logs an error with its stack, even if the server is quiet. */
function report(what: string, error: unknown): void {
  printError(() => {
    const lines = `${what}: ${inspect(error)}`.split("\n");
    return lines.map(escapeControls).join("\n  "); // so that no line looks like another report
  });
}

/** Shows a message in the log: a text by its first 80 characters, bytes by their count. */
function preview(message: Message): string {
  if (typeof message !== "string") return `${message.length} bytes`;
  if (message.length <= 80) return quote(message);
  return `${quote(`${message.slice(0, 80)}…`)} (length ${message.length})`;
}

function quote(text: string): string {
  return `"${escapeControls(text)}"`;
}

/** What a client sends must not control the terminal, nor look like a line of the log. */
function escapeControls(text: string): string {
  return text.replace(/[\p{Cc}\p{Zl}\p{Zp}\p{Bidi_Control}]/gu, (character) => {
    return "\\u" + character.charCodeAt(0).toString(16).padStart(4, "0");
  });
}

/** Joins a host and a port as in a URL. Bun may not know them if the client has left already. */
function hostPort(host = "unknown", port = 0): string {
  return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
}

const HELP = `\
A WebSocket server; dumb-increment-protocol answers each message with the message reversed.
Subprotocols: ${Object.keys(subprotocols).join(", ")}.

  --port N            listen on port N; 0: any free one (default: PORT, else 9000)
  --hostname NAME     listen on NAME (default: 0.0.0.0; :: adds IPv6)
  --default NAME      the subprotocol for clients that offer none
  --origin URL        only pages of this origin may connect (repeatable)
  --limit NAME=VALUE  change a limit (repeatable): ${Object.keys(limits).join(", ")}
  --cert FILE         a certificate in PEM, for TLS (Deno: with --allow-read)
  --key FILE          the private key of the certificate in PEM
  --reuse-port        share the port with other processes (Linux)
  --quiet             log only the listening address and errors
  --help              show this`;

/** Starts a server that a signal stops. Throws an Error if it cannot start, or a flag is wrong. */
function main(args: string[]): void {
  const { values } = parseArgs({
    args,
    options: {
      port: { type: "string" },
      hostname: { type: "string" },
      default: { type: "string" },
      origin: { type: "string", multiple: true },
      limit: { type: "string", multiple: true },
      cert: { type: "string" },
      key: { type: "string" },
      "reuse-port": { type: "boolean" },
      quiet: { type: "boolean" },
      help: { type: "boolean", short: "h" },
    },
  });
  if (values.help) return console.log(HELP);

  const { port, cert, key, quiet } = values;
  const hostname = values.hostname?.replace(/^\[(.*)\]$/, "$1"); // an IPv6 address as in a URL
  const server = serve({
    port: port === undefined ? environmentPort() : wholeNumber("--port", port, PORT_RANGE),
    hostname,
    reusePort: values["reuse-port"],
    cert: cert && readFileSync(cert, "utf8"),
    key: key && readFileSync(key, "utf8"),
    origins: values.origin,
    defaultSubprotocol: values.default,
    quiet,
    limits: Object.fromEntries((values.limit ?? []).map(parseLimit)),
  });
  stopOnSignal(server);
  // An exception in a timer or a promise of a subprotocol must not end the server.
  process.on("uncaughtException", (error) => report("uncaught exception", error));
  process.on("unhandledRejection", (error) => report("unhandled rejection", error));
  const isEverywhere = hostname === undefined || hostname === "0.0.0.0" || hostname === "::";
  const host = hostPort(isEverywhere ? "localhost" : hostname, server.port);
  printLine(() => `Listening on ${cert ? "https" : "http"}://${host}/`);
}

/** Returns the port that PORT names. Deno may not be allowed to read it, and would ask the user. */
function environmentPort(): number | undefined {
  const isReadable = typeof Bun !== "undefined" ||
    Deno.permissions.querySync({ name: "env", variable: "PORT" }).state === "granted";
  const text = isReadable ? process.env.PORT : "";
  return text ? wholeNumber("PORT", text, PORT_RANGE) : undefined;
}

/** Parses a limit such as "idleSeconds=60". */
function parseLimit(text: string): [name: string, value: number] {
  const [name] = text.split("=", 1);
  return [name, checkLimit(name, text.slice(name.length + 1))];
}

/** The first signal stops the server, a later one ends the process at once. */
function stopOnSignal(server: Server): void {
  let firstSignalTime: number | undefined;
  function onSignal(): void {
    if (firstSignalTime === undefined) server.stop().finally(() => process.exit(0));
    firstSignalTime ??= performance.now();
    // Ctrl+C may arrive twice, from the terminal and from `deno task`, but not half a second later.
    if (performance.now() - firstSignalTime > 500) process.exit(1);
  }
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, onSignal);
}

type Range = readonly [least: number, most: number];
const PORT_RANGE: Range = [0, 65535];

/** The values that each limit may have. */
const limitRanges: Record<keyof Limits, Range> = {
  messageBytes: [1, 64 * 1024 * 1024 - 1], // Deno ends the connection at a frame of 64 MiB
  unreadBytes: [SMALL_UNREAD_BYTES, 2 ** 40],
  allUnreadBytes: [SMALL_UNREAD_BYTES, 2 ** 40],
  connections: [1, 2 ** 40],
  idleSeconds: [8, 960], // the range of Bun
  stopSeconds: [0, 3600],
};

/** Adds the defaults. Throws an Error if an option is wrong that a runtime might not complain of. */
function completeOptions(given: Options) {
  const {
    hostname = "0.0.0.0",
    reusePort = false, // must be given, since Bun treats undefined as true
    quiet = false,
    subprotocols: table = subprotocols,
  } = given;
  const { cert, key, defaultSubprotocol: name } = given;
  const port = wholeNumber("a port", given.port ?? 9000, PORT_RANGE); // 9000 as in the tutorial
  if (hostname === "") throw new Error("a hostname must not be empty");
  const hasTls = cert !== undefined || key !== undefined;
  if (hasTls && (!cert || !key)) {
    throw new Error("both options.cert and options.key must be given together");
  }
  if (name !== undefined && !Object.hasOwn(table, name)) {
    const names = Object.keys(table).join(", ");
    throw new Error(`the default subprotocol must be one of: ${names}; not '${name}'`);
  }
  const completeLimits = { ...limits };
  for (const [name, value] of Object.entries(given.limits ?? {})) {
    if (value !== undefined) completeLimits[name as keyof Limits] = checkLimit(name, value);
  }
  const origins = given.origins?.map(parseOrigin);
  const complete = { port, hostname, reusePort, quiet, subprotocols: table, origins };
  return { ...given, ...complete, limits: completeLimits };
}

/** Returns the value of a limit as a number. */
function checkLimit(name: string, value: number | string): number {
  if (Object.hasOwn(limits, name)) {
    return wholeNumber(`limits.${name}`, value, limitRanges[name as keyof Limits]);
  }
  throw new Error(`there is no limit named ${name}; there are: ${Object.keys(limits).join(", ")}`);
}

/** Returns a number, or a text of digits, as a number if it is whole and in the range. */
function wholeNumber(what: string, value: number | string, [least, most]: Range): number {
  const number = /^\d+$/.test(String(value)) ? Number(value) : NaN;
  if (number >= least && number <= most) return number;
  throw new Error(`${what} must be a whole number from ${least} to ${most}, not ${value}`);
}

/** Returns an origin as browsers send it, without a default port or a slash (RFC 6454, 6.2). */
function parseOrigin(text: string): string {
  if (text === "null") return text; // from a page opened as a file or in a sandboxed frame
  const url = URL.parse(text);
  const origin = url ? `${url.protocol}//${url.host}` : ""; // url.origin knows fewer schemes
  const isOnlyOrigin = url?.href === origin || url?.href === `${origin}/`;
  const isSentByBrowsers = !/^(ws|wss|ftp|file):/.test(origin);
  if (isOnlyOrigin && isSentByBrowsers) return origin;
  throw new Error(`an origin must be like https://example.org, not '${text}'`);
}

// ---- 8. The subprotocol on-demand ---------------------------------------------------------------
// A small language over messages, for tests of clients and proxies. Every number and every text has
// a limit here; `send` limits how much may be unread.

const commandHelp = "commands: close CODE REASON, delay MILLISECONDS TEXT, repeat TIMES TEXT, " +
  "bytes COUNT, headers, help";

/** Does what a message asks for, such as "close 4001 bye". */
function onDemand(connection: Connection, handshake: Handshake): MessageHandler {
  const { messageBytes, unreadBytes } = connection.limits;
  const timers = new Set<ReturnType<typeof setTimeout>>();
  connection.onclose = () => timers.forEach((timer) => clearTimeout(timer));

  const commands: Record<string, (number: number, text: string) => Message | void> = {
    close(code, reason) {
      try {
        connection.close(code, reason);
      } catch (error) {
        return (error as RangeError).message; // it says which codes and reasons are allowed
      }
    },
    delay(milliseconds, text) {
      const isAllowed = milliseconds <= 60_000 && text.length <= 1000 && timers.size < 8;
      if (!isAllowed) return "delay: at most 60000 milliseconds, 1000 characters, 8 at a time";
      const timer = setTimeout(() => {
        timers.delete(timer);
        connection.send(text);
      }, milliseconds);
      timers.add(timer);
    },
    repeat(times, text) {
      const copyMemory = Buffer.byteLength(text) + MESSAGE_OVERHEAD_BYTES;
      const mostTimes = Math.floor(unreadBytes / 2 / copyMemory);
      if (times > mostTimes) return `repeat TIMES TEXT: this text at most ${mostTimes} times`;
      for (let i = 0; i < times; i++) connection.send(text);
    },
    bytes(length) {
      if (length > messageBytes) return `bytes COUNT: at most ${messageBytes}`;
      return new Uint8Array(length);
    },
    headers: () => describeHandshake(handshake),
    help: () => commandHelp,
  };

  return (message) => {
    const { command, digits = "Infinity", text = "" } = parseCommand(message);
    const isKnown = Object.hasOwn(commands, command);
    return commands[isKnown ? command : "help"](Number(digits), text);
  };
}

/** Parses "delay 500 hello": a word, a number of up to 15 digits, a text. Bytes ask for help. */
function parseCommand(message: Message): Record<string, string> {
  const line = typeof message === "string" ? message : "help";
  const parts = /^(?<command>\w+)(?: (?<digits>\d{1,15})(?= |$))?(?: (?<text>.*))?$/s.exec(line);
  return parts?.groups ?? { command: "help" };
}

/** The scripts of a page may not read HttpOnly cookies and credentials, so these are hidden. */
function describeHandshake({ address, url, headers }: Handshake): string {
  const shownHeaders = Object.fromEntries(headers);
  for (const name of ["cookie", "authorization"]) {
    if (headers.has(name)) shownHeaders[name] = "(hidden)";
  }
  return JSON.stringify({ address, url, headers: shownHeaders });
}

// ---- 9. How a message is reversed ---------------------------------------------------------------
// This part has nothing to do with sockets. What a reader sees as one character, such as "é" or a
// flag, may be several units of a JavaScript string: a grapheme cluster (UAX #29). The clusters are
// reversed, not the units. `Intl.Segmenter` finds them, but takes 100 to 400 ns for each, so it is
// asked only where it is needed. Some units join their neighbours: combining marks, joiners,
// surrogates, Hangul jamo, CR. All others are plain. Two plain units never join each other, so the
// segmenter is asked for the clusters of the units that are not plain. The slowest text of 1 MiB
// that was found takes 0.3 s, in which no other client is served.

const segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });

/**
 * Returns a text's grapheme clusters in reverse order, as `Intl.Segmenter` finds them (UAX #29), or
 * bytes in reverse order. "noe\u0308l🇩🇪" becomes "🇩🇪le\u0308on". Reversing twice may not give the
 * original: "\n\r" becomes "\r\n", which is one cluster.
 */
export function reverse(message: Message): Message {
  if (typeof message !== "string") return message.toReversed();
  const neededBytes = 3 * message.length + 8; // UTF-8 takes up to 3 bytes a unit, padding up to 8
  if (scratch.bytes.length < neededBytes) scratch = makeScratch(2 * neededBytes);
  return reverseAscii(message) ?? reverseClusters(message);
}

/** The memory in which texts are reversed. It grows with the longest text, and never shrinks. */
let scratch = makeScratch(0);

/**
 * Returns three views of new memory: as bytes, as numbers of 8 bytes, as UTF-16 units. They begin
 * after 64 unused bytes: without these, making a string of 64 KiB takes Bun 40 µs, not 5 µs, since
 * copying is slow if the string and its source begin at the same place in a memory page.
 */
function makeScratch(byteCount: number) {
  const unusedBytes = 64;
  const memory = new ArrayBuffer(unusedBytes + byteCount);
  return {
    bytes: Buffer.from(memory, unusedBytes),
    numbers: new DataView(memory, unusedBytes),
    units: new Uint16Array(memory, unusedBytes),
  };
}

/**
 * Reverses a text of ASCII without CR; returns undefined for any other. (CR LF is a cluster.) The
 * text is written after up to 7 zero bytes and taken as numbers of 8 bytes. The first number
 * changes places with the last, the second with the last but one, and so on. Reading a number as
 * little-endian and writing it as big-endian reverses its bytes. The numbers are floats, which are
 * the fastest; their bits stay as they are, since bytes of ASCII never make a NaN.
 */
function reverseAscii(text: string): string | undefined {
  const { bytes, numbers } = scratch;
  const paddedLength = Math.ceil(text.length / 8) * 8;
  numbers.setFloat64(0, 0); // the zero bytes
  // In UTF-8, a text that is not ASCII takes more bytes than it has units.
  const byteCount = bytes.write(text, paddedLength - text.length);
  if (byteCount !== text.length || text.includes("\r")) return undefined;
  let left = 0;
  let right = paddedLength - 8;
  while (left <= right) {
    const leftNumber = numbers.getFloat64(left, true);
    const rightNumber = numbers.getFloat64(right, true);
    numbers.setFloat64(left, rightNumber, false);
    numbers.setFloat64(right, leftNumber, false);
    left += 8;
    right -= 8;
  }
  return bytes.toString("latin1", 0, byteCount);
}

/** Reverses any text. Each plain unit is put in its place, and the cluster of each other unit. */
function reverseClusters(text: string): string {
  const { bytes, units } = scratch;
  let segments: Intl.Segments | undefined; // made only if needed, since that takes time
  let index = 0;
  while (index < text.length) {
    const unit = text.charCodeAt(index);
    if (plainUnits[unit] ?? learnWhetherPlain(unit)) {
      units[text.length - 1 - index] = unit;
      index++;
      continue;
    }
    // The cluster may begin before this unit, as "e\u0308" does. Then it overwrites the "e".
    segments ??= segmenter.segment(text);
    const { index: start, segment: cluster } = segments.containing(index)!;
    const end = start + cluster.length;
    for (let i = 0; i < cluster.length; i++) {
      units[text.length - end + i] = cluster.charCodeAt(i);
    }
    index = end;
  }
  return bytes.toString("utf16le", 0, 2 * text.length);
}

/** For each unit, whether it is plain; undefined until it is met. */
const plainUnits: (boolean | undefined)[] = Array(0x10000).fill(undefined);

/**
 * Asks the segmenter whether a unit is plain, once for all. By UAX #29, it is enough to try it after an "a" (marks
 * and joiners join it), beside itself (jamo join), before an "a" (prepended marks join it) and
 * before a line feed (CR joins it). A surrogate is half a character, and never plain.
 */
function learnWhetherPlain(unit: number): boolean {
  const character = String.fromCharCode(unit);
  const probe = "a" + character + character + "a" + character + "\n";
  const isSurrogate = unit >= 0xd800 && unit <= 0xdfff;
  plainUnits[unit] = !isSurrogate && [...segmenter.segment(probe)].length === probe.length;
  return plainUnits[unit];
}

// ---- 10. The start, if this file is run as a program --------------------------------------------

if (import.meta.main) {
  try {
    main(process.argv.slice(2));
  } catch (error) {
    const [reason] = (error as Error).message.split("\n");
    const flagReason = reason.replaceAll(" options.", " --"); // options.port is the flag --port
    console.error(`Cannot start: ${flagReason} (see --help)`);
    process.exit(1);
  }
}
