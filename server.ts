/**
 * A WebSocket server for Deno and Bun. It speaks several subprotocols; the first of them,
 * dumb-increment-protocol, answers each message with the message reversed.
 *
 * The idea: the runtime gives each HTTP request to `answer`, which returns a page, a refusal or a
 * `Connection`. When a connection opens, it calls its subprotocol, which returns a message handler.
 * From then on, the runtime gives each message of the client to the connection, which calls the
 * handler and sends back what the handler returns. Most of the rest protects the server and its
 * clients from each other.
 *
 * Read the file from the top. For the idea alone, read part 1, `answer`, and the methods `opened`
 * and `received` of `Connection`.
 *
 * 1. The subprotocols and the limits
 * 2. How a request becomes a page, a refusal or a connection
 * 3. A connection
 * 4. The two runtimes, side by side
 * 5. How the server starts and stops; the log; the command line
 * 6. The subprotocol on-demand
 * 7. How a message is reversed
 * 8. The start, if this file is run as a program
 */
import { Buffer } from "node:buffer";
import { createPrivateKey, hash, X509Certificate } from "node:crypto";
import { readFileSync } from "node:fs";
import process from "node:process";
import timers from "node:timers";
import { setTimeout as sleep } from "node:timers/promises";
import { inspect, parseArgs } from "node:util";
import indexHtml from "./index.html" with { type: "text" };

// ---- 1. The subprotocols and the limits ---------------------------------------------------------
// Many subprotocols live on one port, each independent of the others. A client names the one that
// it wants to speak. A subprotocol is a function: it is called with each new connection and returns
// the message handler, the function that answers the messages of this connection.

/** The text of a text message, or the bytes of a binary message. */
export type Message = string | Uint8Array<ArrayBuffer>;

/**
 * Returns the reply to a message, or nothing for no reply. Must not be async: to reply later, call
 * `connection.send`.
 */
export type MessageHandler = (message: Message) => Message | void;

/**
 * Is called once for each new connection. Returns its message handler, or nothing if its messages
 * need no answer. Must not be async. If it or the handler throws, the connection is closed with
 * 1011. An error that is thrown later, such as in a timer, is not caught here: a server started
 * from the command line logs it and goes on, and a program that calls `serve` must catch it itself.
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
  "on-demand": onDemand, // part 6; for tests of clients and proxies
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

/** The default limits. `serve({ limits: { ... } })` replaces some of them. */
export const limits = {
  /**
   * The longest message, in bytes (of text: of UTF-8). A longer one closes with 1009. Deno notices
   * it only when the whole message is in memory.
   */
  messageBytes: 1024 * 1024,
  /**
   * The memory of one client's unread messages, in bytes. A client over this limit is closed with
   * 1008 instead of being sent its next message.
   */
  unreadBytes: 20 * 1024 * 1024,
  /**
   * The memory of all clients' unread messages, in bytes. While it is over this limit, a client
   * with more than 64 KiB unread (`SMALL_UNREAD_BYTES`) is closed with 1008 instead of being sent
   * its next message. Clients with less are never closed for it, so this is no hard limit.
   */
  allUnreadBytes: 96 * 1024 * 1024,
  /**
   * Connections at the same time. Further handshakes are refused with 503. A closed connection
   * still counts until the runtime reports its end, and `idleSeconds` longer if much was left
   * unread.
   */
  connections: 10_000,
  /**
   * Seconds until a connection without a sign of life is ended. Bun counts every byte that arrives
   * as a sign of life. Deno is stricter: after half of `idleSeconds` it sends a ping, and then only
   * a pong or a whole message counts. A client cannot send a pong in the middle of a frame, so a
   * frame must arrive within the other half: 1 MiB in 54 s is 155 kbit/s. More seconds would serve
   * slower clients, but a dead client is to be noticed within two minutes. (Deno does not end a
   * client that has unread messages, see `DenoSocket`.)
   */
  idleSeconds: 108,
  /** The most seconds that a stopping server waits until its connections have ended. */
  stopSeconds: 1,
};

export type Limits = typeof limits;

/** The least and the greatest value of some limits. The others may be 1 to GREATEST_LIMIT. */
const limitRanges: Partial<Record<keyof Limits, [least: number, most: number]>> = {
  messageBytes: [1, 64 * 1024 * 1024 - 1], // Deno ends the connection at a frame of 64 MiB
  idleSeconds: [8, 960], // the range of Bun
  stopSeconds: [0, 3600],
};

const GREATEST_LIMIT = 2 ** 40; // far more than any limit can usefully be

// ---- 2. How a request becomes a page, a refusal or a connection ---------------------------------
// A WebSocket begins with an HTTP request, the handshake. The server answers it with status 101,
// and from then on the two sides exchange messages over the same TCP connection. The handshake is
// checked here, before the runtime looks at it, so that Deno and Bun refuse the same with the same
// words.
//
// Some requests never come here, because a runtime refuses them by itself. Deno refuses requests
// with two Host headers, and handshakes with a body. Bun refuses requests without a Host header
// (except in HTTP/1.0), unknown methods, and "OPTIONS *". The runtimes do not say the version of
// HTTP, so a handshake in HTTP/1.0 is not refused.

/** What a client sent to begin its connection. A proxy on the way may have changed it. */
export interface Handshake {
  /** The IP address and port of the client or, behind a proxy, of the proxy. */
  readonly address: string;
  /** The request line, rebuilt from the URL: always GET, always HTTP/1.1. */
  readonly requestLine: string;
  readonly headers: Headers;
}

/** What the requests and the connections of one server share. */
interface ServerState {
  /** The options of `serve` (part 5), checked and with the defaults. */
  readonly options: CompleteOptions;
  /** Logs a line, unless too many were logged just now. Undefined if the server is quiet. */
  readonly log?: (makeLine: () => string) => void;
  /**
   * All connections, including those that are closed but still take memory. On Bun, a Set would add
   * 100 bytes to the 2.2 KB that an idle connection takes. To find one of 10,000 in the array takes
   * 2 µs.
   */
  readonly connections: Connection[];
  /** The memory of the unread messages of all clients, in bytes, when it was last measured. */
  allUnreadMemory: number;
  /** When it was last measured, in milliseconds, by performance.now(). */
  measuredTime: number;
  isStopping: boolean;
}

/** Answers a request: with a page, a refusal, or a Connection if the request is to be upgraded. */
function answer(request: Request, address: string, state: ServerState): Response | Connection {
  const { options } = state;
  const { method, headers } = request;
  const header = (name: string) => headers.get(name) ?? "";

  // Browsers do not say why a handshake was refused, so the log does.
  function refuse(status: number, reason: string, moreHeaders?: Record<string, string>): Response {
    state.log?.(() => `refused: ${address}, ${status}, ${reason}`);
    return textResponse(status, reason, moreHeaders);
  }

  // The runtime makes the URL with the Host header, so a Host such as "a/b" would change its path.
  const url = URL.parse(request.url);
  const isHostValid = /^[\w.:[\]-]*$/.test(header("host")); // also true without a Host header
  if (!url || !isHostValid) return refuse(400, "The URL or the Host header is not valid.");

  // Either header marks a handshake. If a proxy has removed the other, a refusal below says so.
  const isHandshake = hasToken(header("upgrade"), "websocket") || headers.has("sec-websocket-key");
  if (!isHandshake) {
    const isAllowed = method === "GET" || method === "HEAD";
    if (!isAllowed) return textResponse(405, "Use GET.", { allow: "GET, HEAD" });
    if (url.pathname !== "/") return textResponse(404, "The page is at /.");
    return new Response(page, { headers: pageHeaders }); // both are at the end of this part
  }

  // RFC 6455 section 4.2.1 says what a handshake must contain.
  if (method !== "GET") return refuse(405, "A handshake must use GET.", { allow: "GET" });
  if (!header("host")) return refuse(400, "The Host header is missing.");
  if (!hasToken(header("upgrade"), "websocket")) {
    return refuse(400, "The header Upgrade: websocket is missing.");
  }
  if (!hasToken(header("connection"), "upgrade")) {
    return refuse(400, "The header Connection: Upgrade is missing.");
  }
  if (headers.has("content-length") || headers.has("transfer-encoding")) {
    return refuse(400, "A handshake must not have a body, nor a Content-Length.");
  }
  const origin = headers.get("origin");
  if (options.origins && origin !== null && !options.origins.includes(origin)) {
    return refuse(403, "Pages of this origin may not connect.");
  }
  const subprotocolName = selectSubprotocol(headers.get("sec-websocket-protocol"), options);
  if (!subprotocolName) {
    const names = Object.keys(options.subprotocols).join(", ");
    return refuse(400, `Sec-WebSocket-Protocol must offer one of: ${names}.`);
  }
  if (header("sec-websocket-version") !== "13") {
    // Asked for by RFC 6455 section 4.2.2, and by RFC 9110 section 15.5.22.
    const offer = { "sec-websocket-version": "13", upgrade: "websocket", connection: "Upgrade" };
    return refuse(426, "Sec-WebSocket-Version must be 13.", offer);
  }
  if (!/^[A-Za-z0-9+/]{22}==$/.test(header("sec-websocket-key"))) {
    return refuse(400, "Sec-WebSocket-Key must be 16 bytes in base64.");
  }
  const retryLater = { "retry-after": "10" }; // seconds
  if (state.isStopping) return refuse(503, "The server is about to stop.", retryLater);
  const isFull = state.connections.length >= options.limits.connections;
  if (isFull) return refuse(503, "The server is full.", retryLater);

  const requestLine = `GET ${url.pathname}${url.search} HTTP/1.1`;
  return new Connection(subprotocolName, { address, requestLine, headers }, state);
}

/**
 * Returns the name of the first offered subprotocol that the server speaks, compared exactly; the
 * default if nothing is offered.
 */
function selectSubprotocol(offers: string | null, options: CompleteOptions): string | undefined {
  if (offers === null) return options.defaultSubprotocol;
  const selected = splitList(offers).find((name) => Object.hasOwn(options.subprotocols, name));
  // Return the table's own string: `selected` is a part of the header and would keep all of it in
  // memory.
  return Object.keys(options.subprotocols).find((name) => name === selected);
}

function hasToken(header: string, token: string): boolean {
  return splitList(header).some((item) => item.toLowerCase() === token);
}

/** Splits a header at its commas; spaces and tabs around an item do not count (RFC 9110, 5.6.1). */
function splitList(header: string): string[] {
  return header.split(",").map((item) => item.replace(/^[ \t]+|[ \t]+$/g, ""));
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

// The page may use its own style and script, show images that are in it, and open WebSockets.
const contentSecurityPolicy = [
  "default-src 'none'",
  `style-src ${contentHash("style")}`,
  `script-src ${contentHash("script")}`,
  "img-src data:",
  "connect-src ws: wss:",
  "base-uri 'none'",
  "form-action 'none'",
  "frame-ancestors 'none'",
].join("; ");

const pageHeaders = {
  "content-type": "text/html; charset=utf-8",
  "content-security-policy": contentSecurityPolicy,
  "x-content-type-options": "nosniff",
};

/** Returns the hash of the page's only style or script, as a Content-Security-Policy writes it. */
function contentHash(element: "style" | "script"): string {
  const start = page.indexOf(">", page.indexOf(`<${element}`)) + 1;
  const content = page.slice(start, page.indexOf(`</${element}>`));
  return `'sha256-${hash("sha256", content, "base64")}'`;
}

// ---- 3. A connection ----------------------------------------------------------------------------
// A `Connection` calls its subprotocol and keeps one client from harming the others, as far as the
// runtime lets it. If the subprotocol throws, only this connection is closed.
//
// Messages to a client that does not read wait in the server's memory; here they are called unread.
// (The operating system holds some more, of which the server knows nothing.) To stop reading from
// such a client until it has caught up is called backpressure. Bun can do it, Deno cannot (part 4).
// And it does not help in a chat, where the messages come from other clients. So on both runtimes
// `send` closes a client that has left too much unread.
//
// The life of a connection: it is open until the client or the server closes it. From then on, its
// subprotocol can send nothing, and receives nothing that comes later. What is unread is still
// delivered, if the client reads. When the runtime reports the end, the connection leaves
// `state.connections`; but if much is unread then, it stays there for another `idleSeconds`, since
// it still takes memory.

/** What a connection needs of a runtime's socket. */
interface Socket {
  /** Sends a message, or lets it wait. Returns false if the client has begun to close. */
  send(message: Message): boolean;
  /**
   * The memory of the unread messages, in bytes. The limits apply to it. A runtime may keep some
   * messages after the connection has ended; these count, too.
   */
  unreadMemory(): number;
  /** Sends a close frame after the unread messages. Returns at once. */
  close(code: number, reason: string): void;
}

/**
 * A client may always have this much unread, unless `limits.unreadBytes` is small. If it has more,
 * Bun stops reading from it, `limits.allUnreadBytes` may close it, and after its end it still
 * counts for a while.
 */
const SMALL_UNREAD_BYTES = 64 * 1024;

const UNREAD_REASON = "too many unread messages";
const STOP_REASON = "the server is stopping";

/** One connection with a client, the same on both runtimes. */
export class Connection {
  /**
   * Is called once, soon after the client has left or the server has closed the connection. After a
   * close by the server, the client may still be connected. Must not be async. Set it before the
   * subprotocol's function returns.
   */
  onclose?: () => void;

  readonly subprotocolName: string;

  /** The IP address and port of the client or, behind a proxy, of the proxy. */
  readonly address: string;

  readonly #state: ServerState;
  #handshake?: Handshake; // until it opens
  #socket?: Socket; // since it opened
  #handler?: MessageHandler;
  #isOpen = false;

  constructor(subprotocolName: string, handshake: Handshake, state: ServerState) {
    this.subprotocolName = subprotocolName;
    this.address = handshake.address;
    this.#handshake = handshake;
    this.#state = state;
  }

  // The sockets in part 4 call the next three methods.

  /** The handshake is done. */
  opened(socket: Socket): void {
    const state = this.#state;
    const handshake = this.#handshake!;
    this.#handshake = undefined; // frees the headers, unless the subprotocol keeps them
    this.#socket = socket;
    this.#isOpen = true;
    state.connections.push(this);
    state.log?.(() => `connected: ${this.address}, ${this.subprotocolName}`);
    if (state.isStopping) return this.close(1001, STOP_REASON);
    // Many handshakes at once may have passed `answer` before the first of them opened.
    const isOneTooMany = state.connections.length > this.limits.connections;
    if (isOneTooMany) return this.close(1013, "try again later");
    try {
      const subprotocol = state.options.subprotocols[this.subprotocolName];
      const handler = subprotocol(this, handshake);
      checkNotAsync(handler);
      if (handler) this.#handler = handler;
    } catch (error) {
      this.#fail(error);
    }
  }

  /** A whole message has arrived. */
  received(message: Message): void {
    if (!this.#isOpen) return;
    try {
      const reply = this.#handler?.(message);
      checkNotAsync(reply);
      const isSent = reply !== undefined && this.#trySend(reply);
      this.#state.log?.(() => {
        const shownReply = isSent ? preview(reply) : "(nothing)";
        return `received data: ${preview(message)}, replying: ${shownReply}`;
      });
    } catch (error) {
      this.#state.log?.(() => `received data: ${preview(message)}, failing`);
      this.#fail(error, message);
    }
  }

  /**
   * The runtime reports the end. This happens once, and after `opened`. When the server closes, Bun
   * calls this before `BunSocket.close` returns. In all other cases, the close frames have been
   * exchanged by then, or TCP has ended.
   */
  ended(code: number): void {
    if (this.#isOpen) this.#markClosed(code);
    if (this.unreadMemory <= SMALL_UNREAD_BYTES) return this.#forget();
    // Messages are kept after the end in two cases: on Bun, if they are unread when a close frame
    // comes from either side; on Deno, if our close frame waits behind them. Neither runtime
    // reports when it frees them, so they count for `idleSeconds` more. By then Bun has done so;
    // Deno may not have, and then the memory is in use, but no longer counted. (The timer is one of
    // Node.js, since only those have unref() on both runtimes.)
    timers.setTimeout(() => this.#forget(), this.limits.idleSeconds * 1000).unref();
  }

  // A subprotocol uses the next four members.

  /** The limits of the server. */
  get limits(): Readonly<Limits> {
    return this.#state.options.limits;
  }

  /** The memory of what this client has not read, in bytes. */
  get unreadMemory(): number {
    return this.#socket!.unreadMemory();
  }

  /**
   * Sends a message; does nothing once the connection is closed. A client that has left more unread
   * than `limits` allow is closed with 1008 instead. Throws a TypeError if the message is neither a
   * string nor a Uint8Array.
   */
  send(message: Message): void {
    const isSent = this.#trySend(message);
    if (isSent) this.#logAfterHandler(() => `sending data: ${preview(message)}`);
  }

  /**
   * Closes the connection. Throws a RangeError if a close frame may not hold the code, or if the
   * reason is longer than 123 bytes in UTF-8 (RFC 6455 sections 7.4 and 5.5).
   */
  close(code = 1000, reason = ""): void {
    checkClose(code, reason);
    if (!this.#isOpen) return;
    this.#markClosed(code);
    this.#socket!.close(code, reason);
  }

  /** Returns whether the message was sent. */
  #trySend(message: Message): boolean {
    if (typeof message !== "string" && !(message instanceof Uint8Array)) {
      throw new TypeError("a message must be a string or a Uint8Array");
    }
    if (!this.#isOpen) return false;
    if (this.#hasTooMuchUnread()) {
      this.close(1008, UNREAD_REASON);
      return false;
    }
    return this.#socket!.send(message);
  }

  #hasTooMuchUnread(): boolean {
    const { unreadMemory } = this;
    if (unreadMemory > this.limits.unreadBytes) return true;
    if (unreadMemory <= SMALL_UNREAD_BYTES) return false;
    return measureAllUnread(this.#state) > this.limits.allUnreadBytes;
  }

  #forget(): void {
    const { connections } = this.#state;
    const index = connections.indexOf(this);
    if (index >= 0) connections.splice(index, 1); // at -1, splice would remove another one
  }

  /** An exception in a subprotocol ends its connection and nothing else. */
  #fail(error: unknown, message?: Message): void {
    const suffix = message === undefined ? "" : `, message: ${preview(message)}`;
    report(`${this.address}, ${this.subprotocolName}${suffix}`, error);
    this.close(1011, "internal error");
  }

  /** From now on the subprotocol can send nothing, and receives nothing that comes later. */
  #markClosed(code: number): void {
    this.#isOpen = false;
    this.#logAfterHandler(() => `closed: ${this.address}, code ${code}`);
    queueMicrotask(() => {
      // Not at once, since a subprotocol's function may first call `close` and then set `onclose`.
      try {
        checkNotAsync(this.onclose?.());
      } catch (error) {
        report(`${this.address}, ${this.subprotocolName}, onclose`, error);
      }
    });
  }

  /**
   * Logs in a microtask, so that the lines that a handler causes come below "received data: …,
   * replying: …", which is logged when the handler has returned.
   */
  #logAfterHandler(makeLine: () => string): void {
    const { log } = this.#state;
    if (log) queueMicrotask(() => log(makeLine));
  }
}

/**
 * Returns the memory of the unread messages of all clients, in bytes, as it was at most 10 ms ago.
 * It is not measured each time, since that takes up to a millisecond.
 */
function measureAllUnread(state: ServerState): number {
  const now = performance.now();
  if (now - state.measuredTime >= 10) {
    state.measuredTime = now;
    state.allUnreadMemory = 0;
    for (const { unreadMemory } of state.connections) state.allUnreadMemory += unreadMemory;
  }
  return state.allUnreadMemory;
}

/**
 * Throws if a close frame may not hold the code (RFC 6455 section 7.4, and the codes that IANA has
 * registered since) or the reason (section 5.5).
 */
function checkClose(code: number, reason: string): void {
  const isRegistered = (code >= 1000 && code <= 1003) || (code >= 1007 && code <= 1014);
  const isPrivate = code >= 3000 && code <= 4999;
  const isCodeAllowed = Number.isInteger(code) && (isRegistered || isPrivate);
  if (isCodeAllowed && Buffer.byteLength(reason) <= 123) return;
  throw new RangeError(
    "close: the code must be 1000 to 1003, 1007 to 1014 or 3000 to 4999, " +
      "and the reason at most 123 bytes long",
  );
}

/** Throws if a subprotocol has returned a promise, which nobody would await. */
function checkNotAsync(result: unknown): void {
  if (!(result instanceof Promise)) return;
  result.catch((error) => report("an async function of a subprotocol", error));
  throw new TypeError("a subprotocol's functions must not be async; use connection.send later");
}

// ---- 4. The two runtimes, side by side ----------------------------------------------------------
// Both ask `answer` about each request. They send a Response as it is. For a Connection they
// upgrade the request, and tell its socket, a `DenoSocket` or a `BunSocket`, what happens. The
// socket tells the connection. First come the two servers, then the two sockets, which hold what
// differs when a client does not read.

/** What `serve` needs of a runtime's server. */
interface RuntimeServer {
  readonly port: number;
  stop(): Promise<void>;
}

interface Runtime {
  /** Starts a server. Throws if the port is in use. */
  listen(state: ServerState): RuntimeServer;
  /** Whether a variable such as PORT (part 5) can be read without asking the user. */
  canReadEnvironment(variable: string): boolean;
}

// The server on Deno.

const denoRuntime: Runtime = {
  listen: listenOnDeno,
  canReadEnvironment: (variable) =>
    Deno.permissions.querySync({ name: "env", variable }).state === "granted",
};

/** How long Deno waits before it tries to listen again. */
const LISTEN_AGAIN_MILLISECONDS = 50;

function listenOnDeno(state: ServerState): RuntimeServer {
  let isStopped = false;
  let server = startListening(state.options.port);

  function handleRequest(request: Request, info: Deno.ServeHandlerInfo<Deno.NetAddr>): Response {
    const address = hostPort(info.remoteAddr.hostname, info.remoteAddr.port);
    const result = answer(request, address, state);
    if (result instanceof Response) return result;

    const connection = result;
    const { socket: webSocket, response } = upgradeOnDeno(request, connection);
    const socket = new DenoSocket(webSocket, connection);
    // Listeners take 1 KB less for each connection than onopen, onmessage and onclose.
    webSocket.addEventListener("open", () => socket.opened(), { once: true });
    webSocket.addEventListener("message", ({ data }) => socket.received(data));
    // Deno may report the end twice.
    webSocket.addEventListener("close", ({ code }) => socket.ended(code), { once: true });
    return response;
  }

  function startListening(port: number): Deno.HttpServer<Deno.NetAddr> {
    const { hostname, reusePort, cert, key } = state.options;
    const onListen = () => {}; // without it, Deno prints a line of its own
    const denoOptions = { port, hostname, reusePort, cert, key, onListen };
    const newServer = Deno.serve(denoOptions, handleRequest);
    // Deno stops listening when no file descriptors are left. Open connections go on.
    newServer.finished.catch((error) => {
      printError(() => `stopped listening: ${error.message}; trying again (see ulimit -n)`);
      listenAgain();
    });
    return newServer;
  }

  /** Tries until it listens again, or until the server is stopped. */
  async function listenAgain(): Promise<void> {
    while (true) {
      await sleep(LISTEN_AGAIN_MILLISECONDS);
      if (isStopped) return;
      try {
        server = startListening(server.addr.port);
        return printError(() => "listening again");
      } catch { // Most often, no file descriptor is free yet.
      }
    }
  }

  function stop(): Promise<void> {
    isStopped = true;
    return server.shutdown();
  }

  return { port: server.addr.port, stop }; // if the option was 0, this is the port that was free
}

/**
 * Upgrades a request and names the subprotocol in the response. Deno's option `protocol` works only
 * if the client has separated its offers by ", ", as browsers do. For other clients, the header is
 * set here. In Deno 2.5, the version that Deno Deploy documents, the headers of the response cannot
 * be changed, so these clients get no subprotocol there. When Deno Deploy has 2.9, leave out
 * `protocol` and always set the header.
 */
function upgradeOnDeno(request: Request, connection: Connection): Deno.WebSocketUpgrade {
  const { subprotocolName } = connection;
  const { idleSeconds } = connection.limits;
  const offers = request.headers.get("sec-websocket-protocol");
  const canUseProtocol = offers?.split(", ").includes(subprotocolName);
  const protocol = canUseProtocol ? subprotocolName : undefined;
  const upgrade = Deno.upgradeWebSocket(request, { protocol, idleTimeout: idleSeconds });
  if (offers !== null && !canUseProtocol) {
    try {
      upgrade.response.headers.set("sec-websocket-protocol", subprotocolName);
    } catch { // Deno 2.5
    }
  }
  return upgrade;
}

// The server on Bun. The types `BunServer` and `BunWebSocket` are Bun's own, as far as they are
// needed here. `BunSocket` is ours; Bun keeps it as the data of its socket.

declare const Bun: { serve(options: object): BunServer };

interface BunServer {
  readonly port: number;
  stop(closeNow: boolean): Promise<void>;
  upgrade(request: Request, options: { headers: HeadersInit; data: BunSocket }): boolean;
  requestIP(request: Request): { address: string; port: number } | null;
}

interface BunWebSocket {
  readonly data: BunSocket;
  readonly readyState: number;
  binaryType: string;
  send(message: Message): number;
  close(code: number, reason: string): void;
  getBufferedAmount(): number;
  pause(): void;
  resume(): void;
}

const bunRuntime: Runtime = {
  listen: listenOnBun,
  canReadEnvironment: () => true,
};

function listenOnBun(state: ServerState): RuntimeServer {
  const { port, hostname, reusePort, cert, key } = state.options;

  function handleRequest(request: Request, server: BunServer): Response | undefined {
    const client = server.requestIP(request);
    const result = answer(request, hostPort(client?.address, client?.port), state);
    if (result instanceof Response) return result;

    const connection = result;
    const isOffered = request.headers.has("sec-websocket-protocol");
    const headers = new Headers();
    if (isOffered) headers.set("sec-websocket-protocol", connection.subprotocolName);
    const isUpgraded = server.upgrade(request, { headers, data: new BunSocket(connection) });
    if (isUpgraded) return undefined; // Bun has answered
    return textResponse(400, "Bun has refused the handshake."); // never seen: `answer` is stricter
  }

  const websocket = {
    maxPayloadLength: state.options.limits.messageBytes,
    idleTimeout: state.options.limits.idleSeconds,
    backpressureLimit: 0, // no limit: over it, Bun would silently drop messages
    open: (webSocket: BunWebSocket) => webSocket.data.opened(webSocket),
    message: (webSocket: BunWebSocket, message: Message) => webSocket.data.received(message),
    drain: (webSocket: BunWebSocket) => webSocket.data.drained(),
    close: (webSocket: BunWebSocket, code: number, reason: string) =>
      webSocket.data.ended(code, reason),
  };
  const hasTls = cert !== undefined;
  const server = Bun.serve({
    port,
    hostname,
    reusePort,
    tls: hasTls ? { cert, key } : undefined,
    http2: hasTls, // for the page; Deno speaks HTTP/2 over TLS by itself
    development: false, // no error page that shows source code
    fetch: handleRequest,
    websocket,
  });
  return { port: server.port, stop: () => server.stop(true) };
}

// The socket on Deno.

/** Roughly how many bytes Deno needs for each unread message, besides those of the message. */
const DENO_MESSAGE_OVERHEAD_BYTES = 1024;

/** A close frame that waits until the client has read everything (see `DenoSocket.close`). */
interface Closing {
  readonly code: number;
  readonly reason: string;
  /** When to stop waiting, by performance.now(). Put off while the client reads. */
  deadline: number;
  /** Whether a message of the client has come since the last check. */
  hasClientSent: boolean;
}

/** How often DenoSocket checks whether it can send the close frame. */
const CLOSE_CHECK_MILLISECONDS = 20;

/** How long DenoSocket waits for a client that reads nothing, or goes on sending. */
const CLOSE_PATIENCE_MILLISECONDS = 500;

/**
 * Deno reads all that a client sends, and keeps all that the client does not read. Deno waits for a
 * pong only when its ping has been sent, and the ping waits behind the unread messages. So the idle
 * time never ends a client that leaves messages unread. Nor does it end one that ignores the close
 * frame.
 * `close` delays the close frame; the comment there says why.
 */
class DenoSocket implements Socket {
  readonly #webSocket: WebSocket;
  readonly #connection: Connection;
  readonly #unreadLengths: number[] = []; // of the messages, in bytes; oldest first
  #unreadSum = 0; // the sum of these
  #closing?: Closing; // since close()
  #wasClosedWithUnread = false; // messages were unread when the close frame was sent

  constructor(webSocket: WebSocket, connection: Connection) {
    this.#webSocket = webSocket;
    this.#connection = connection;
  }

  opened(): void {
    this.#connection.opened(this);
  }

  /**
   * Deno cannot be told a limit for messages: it assembles frames of less than 64 MiB into a
   * message of any length. So the length is checked here, when the message is already in memory.
   */
  received(data: string | ArrayBuffer): void { // Deno never gives a Blob here
    if (this.#closing) return this.#receivedWhileClosing(this.#closing);
    if (Buffer.byteLength(data) > this.#connection.limits.messageBytes) {
      return this.#connection.close(1009, "message too big");
    }
    this.#connection.received(typeof data === "string" ? data : new Uint8Array(data));
  }

  ended(code: number): void {
    // At the end Deno frees the unread messages. But if it was told to close while messages were
    // unread, it keeps these, so they still count.
    if (!this.#wasClosedWithUnread) this.#forgetAllMessages();
    this.#connection.ended(code || 1006); // 0 is an end without a close frame
  }

  send(message: Message): boolean {
    if (this.#webSocket.readyState !== WebSocket.OPEN) return false;
    const length = Buffer.byteLength(message);
    this.#unreadLengths.push(length);
    this.#unreadSum += length;
    this.#webSocket.send(message);
    return true;
  }

  unreadMemory(): number {
    // After a close frame in either direction, Deno reports 0 although messages may be unread.
    if (this.#webSocket.readyState === WebSocket.OPEN) this.#forgetReadMessages();
    return this.#unreadSum + this.#unreadLengths.length * DENO_MESSAGE_OVERHEAD_BYTES;
  }

  /**
   * Deno reports how many bytes are unread, but not in how many messages. Messages are sent in
   * order, so the bytes that have been read are those of the oldest messages. An empty message adds
   * no bytes, so nobody can tell when it was read: it counts until bytes of a later message have
   * been read. So, with the default limits, about 20,000 empty replies in a row close even a client
   * that reads.
   */
  #forgetReadMessages(): void {
    let readBytes = this.#unreadSum - this.#webSocket.bufferedAmount;
    // At 0 the loop ends: an empty message is forgotten only if bytes after it have been read.
    while (readBytes > 0 && readBytes >= this.#unreadLengths[0]) {
      const length = this.#unreadLengths.shift()!;
      readBytes -= length;
      this.#unreadSum -= length;
    }
  }

  #forgetAllMessages(): void {
    this.#unreadLengths.length = 0;
    this.#unreadSum = 0;
  }

  /**
   * Once Deno has been told to close, it cuts the connection at the next message or pong that
   * arrives, and the client may never get the close frame. So the frame is sent when the client has
   * read everything and has sent nothing since the last check. It is also sent at the deadline,
   * which is put off while the client reads.
   */
  close(code: number, reason: string): void {
    const deadline = performance.now() + CLOSE_PATIENCE_MILLISECONDS;
    this.#closing = { code, reason, deadline, hasClientSent: false };
    this.#closeWhenRead(this.#closing);
  }

  async #closeWhenRead(closing: Closing): Promise<void> {
    // Even a client that reads slowly gets no more time than this.
    const lastDeadline = performance.now() + this.#connection.limits.idleSeconds * 1000;
    while (performance.now() < closing.deadline) {
      const unreadBefore = this.#webSocket.bufferedAmount;
      closing.hasClientSent = false; // #receivedWhileClosing may set it during the sleep
      await sleep(CLOSE_CHECK_MILLISECONDS);
      const unreadNow = this.#webSocket.bufferedAmount;
      if (unreadNow === 0 && !closing.hasClientSent) break;
      if (unreadNow < unreadBefore) {
        closing.deadline = Math.min(performance.now() + CLOSE_PATIENCE_MILLISECONDS, lastDeadline);
      }
    }
    this.#sendCloseFrame(closing);
  }

  /** A flood may leave Deno no time for timers, so the deadline is checked here, too. */
  #receivedWhileClosing(closing: Closing): void {
    closing.hasClientSent = true;
    if (performance.now() > closing.deadline) this.#sendCloseFrame(closing);
  }

  #sendCloseFrame({ code, reason }: Closing): void {
    if (this.#webSocket.readyState !== WebSocket.OPEN) return; // sent already, or the client left
    this.#forgetReadMessages(); // for the last time, since bufferedAmount is 0 afterwards
    this.#wasClosedWithUnread = this.#webSocket.bufferedAmount > 0;
    this.#webSocket.close(code, reason); // Deno lets a server use all codes
  }
}

// The socket on Bun.

type Timer = ReturnType<typeof setTimeout>;

/**
 * Bun can stop reading from a client until the client has read its replies. So a client that does
 * not read has to wait, and its replies do not pile up.
 */
class BunSocket implements Socket {
  readonly #connection: Connection;
  #webSocket?: BunWebSocket; // since it opened
  #pauseTimer?: Timer; // set during a pause, in which Bun does not read from the client
  #heldMessages?: Message[]; // that Bun had read before the pause
  #unreadBytes = 0; // when last measured

  constructor(connection: Connection) {
    this.#connection = connection;
  }

  opened(webSocket: BunWebSocket): void {
    this.#webSocket = webSocket;
    webSocket.binaryType = "uint8array";
    this.#connection.opened(this);
  }

  /**
   * Bun reads up to 512 KiB at once. If the reply to one message begins a pause, the messages that
   * Bun has read with it still come. They are held until the pause is over. The limits do not count
   * their memory.
   */
  received(message: Message): void {
    const isPaused = this.#pauseTimer !== undefined;
    if (!isPaused) return this.#connection.received(message);
    this.#heldMessages ??= [];
    this.#heldMessages.push(message);
  }

  /**
   * When a message is too big, Bun 1.4.5 sends 1009 and ends the TCP connection, but reports 1006
   * with a reason of its own.
   */
  ended(code: number, reason: string): void {
    // If the client has closed, the subprotocol still gets what it sent before. If the server has
    // closed, `Connection.received` ignores these messages.
    for (const message of this.#heldMessages ?? []) this.#connection.received(message);
    this.#heldMessages = undefined;
    clearTimeout(this.#pauseTimer);
    const isTcpGone = code === 1006;
    if (isTcpGone) this.#unreadBytes = 0;
    const isTooBig = isTcpGone && reason === "Received too big message";
    this.#connection.ended(isTooBig ? 1009 : code);
  }

  send(message: Message): boolean {
    if (this.#webSocket!.readyState !== WebSocket.OPEN) return false;
    this.#webSocket!.send(message);
    if (this.#mustPause()) this.#pause();
    return true;
  }

  /** On Bun, only the bytes of an unread message take memory that is worth counting. */
  unreadMemory(): number {
    this.#measure();
    return this.#unreadBytes;
  }

  #measure(): void {
    // After a close frame of either side, Bun reports 0 although it keeps what is unread.
    const isOpen = this.#webSocket!.readyState === WebSocket.OPEN;
    if (isOpen) this.#unreadBytes = this.#webSocket!.getBufferedAmount();
  }

  #mustPause(): boolean {
    // Half of the limit, so that a client is paused well before it would be closed.
    const halfLimit = this.#connection.limits.unreadBytes / 2;
    return this.unreadMemory() > Math.min(SMALL_UNREAD_BYTES, halfLimit);
  }

  /**
   * Stops reading from the client. A timer ends the connection if the client reads nothing, since
   * Bun's idle timeout does not run during a pause. (It runs again once the server has closed.)
   */
  #pause(): void {
    // A bug in Bun 1.4.5: once the client has read a part, Bun reads from the client again, but
    // still takes the connection for paused, so that pause() alone does nothing. So resume() comes
    // first. When the bug is fixed, it can go.
    this.#webSocket!.resume();
    this.#webSocket!.pause();
    const { idleSeconds } = this.#connection.limits;
    const closeIdle = () => this.#connection.close(1008, UNREAD_REASON);
    // Every send during the pause comes here, but gives the client no more time.
    this.#pauseTimer ??= setTimeout(closeIdle, idleSeconds * 1000);
  }

  /** The client has read some of what was unread. */
  drained(): void {
    // Bun delivers no new message before this returns, so none can overtake a held one.
    this.#resume();
    this.#receiveHeldMessages();
    const isOpen = this.#webSocket!.readyState === WebSocket.OPEN; // a held message may close it
    if (isOpen && this.#mustPause()) this.#pause(); // the client has read too little
  }

  #resume(): void {
    clearTimeout(this.#pauseTimer);
    this.#pauseTimer = undefined;
    this.#webSocket!.resume();
  }

  #receiveHeldMessages(): void {
    const messages = this.#heldMessages ?? [];
    let receivedCount = 0;
    // If a message closes the connection, `Connection.received` ignores the others.
    for (const message of messages) {
      if (this.#mustPause()) break;
      this.#connection.received(message);
      receivedCount++;
    }
    messages.splice(0, receivedCount);
  }

  /** Bun reports the end at once, even if the client reads nothing and the close frame waits. */
  close(code: number, reason: string): void {
    this.#measure();
    this.#webSocket!.close(code, reason);
  }
}

const runtime = typeof Bun === "undefined" ? denoRuntime : bunRuntime;

// ---- 5. How the server starts and stops; the log; the command line ------------------------------
// `serve` starts a server for a program, `main` for the command line.

/**
 * The options of {@linkcode serve}. To add one, describe it here and add its flag to `flagTable`.
 * If it has a default or needs a check, `defaultOptions` or `completeOptions` name it, too.
 */
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
  /**
   * The origins whose pages may connect, such as "https://example.org". Default: all origins.
   * Clients that send no Origin header are not browsers; this option does not restrict them.
   */
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

/** The defaults of the options that have one. */
const defaultOptions = {
  port: 9000, // as in the tutorial
  hostname: "0.0.0.0",
  reusePort: false, // must be given, since Bun treats undefined as true
  quiet: false,
  subprotocols,
  limits,
};

/** Options that are checked and have the defaults. */
type CompleteOptions = Readonly<Options & typeof defaultOptions>;

/** A running server. */
export interface Server {
  /** The port on which it listens. */
  readonly port: number;
  /**
   * Closes all connections with 1001, waits for them at most `limits.stopSeconds`, and frees the
   * port. On Deno, a client that ignores the close frame stays connected.
   */
  stop(): Promise<void>;
}

/** Starts a server. Throws an Error if it cannot listen, or if an option is wrong. */
export function serve(givenOptions: Options = {}): Server {
  const options = completeOptions(givenOptions);
  const state: ServerState = {
    options,
    log: options.quiet ? undefined : printLine,
    connections: [],
    allUnreadMemory: 0,
    measuredTime: -Infinity,
    isStopping: false,
  };
  const runtimeServer = tryToListen(state);
  return { port: runtimeServer.port, stop: () => stopServer(runtimeServer, state) };
}

/** How often a stopping server checks whether its connections have ended. */
const STOP_CHECK_MILLISECONDS = 10;

/** How long a stopping server waits for requests that are not finished. */
const UNFINISHED_REQUEST_MILLISECONDS = 100;

async function stopServer(runtimeServer: RuntimeServer, state: ServerState): Promise<void> {
  state.isStopping = true;
  const connections = [...state.connections]; // a copy, since they may leave the array meanwhile
  for (const connection of connections) connection.close(1001, STOP_REASON);
  const deadline = performance.now() + state.options.limits.stopSeconds * 1000;
  // On Bun, most connections have left the array already (see `BunSocket.close`), and Bun still
  // delivers what they have unread. If one with much unread has stayed, this waits for all of
  // `stopSeconds`.
  while (state.connections.length > 0 && performance.now() < deadline) {
    await sleep(STOP_CHECK_MILLISECONDS);
  }
  // Without the race, Deno would wait for ever for a client that does not finish its request.
  await Promise.race([runtimeServer.stop(), sleep(UNFINISHED_REQUEST_MILLISECONDS)]);
}

function tryToListen(state: ServerState): RuntimeServer {
  try {
    return runtime.listen(state);
  } catch (error) {
    const { port, hostname } = state.options;
    const { code, message } = error as Error & { code?: string };
    if (code === "EADDRINUSE") throw new Error(`port ${port} is in use; try another --port`);
    const where = hostPort(hostname, port);
    throw new Error(`cannot listen on ${where}; check --hostname and --port: ${message}`);
  }
}

/** Adds the defaults and checks each option. Throws an Error that says which one is wrong. */
function completeOptions(givenOptions: Options): CompleteOptions {
  const options = {
    ...defaultOptions,
    ...withoutUndefined(givenOptions),
    limits: { ...defaultOptions.limits, ...withoutUndefined(givenOptions.limits ?? {}) },
  };
  checkPort(options.port);
  checkTls(options.cert, options.key);
  checkDefaultSubprotocol(options);
  checkLimits(options.limits);
  return {
    ...options,
    hostname: parseHostname(options.hostname),
    origins: options.origins?.map(parseOrigin),
  };
}

function withoutUndefined<Values extends object>(values: Values): Values {
  const given = Object.entries(values).filter(([, value]) => value !== undefined);
  return Object.fromEntries(given) as Values;
}

function checkLimits(values: Limits): void {
  for (const [name, value] of Object.entries(values)) {
    if (!Object.hasOwn(defaultOptions.limits, name)) {
      throw new Error(`there is no limit named ${name}`);
    }
    const [least, most] = limitRanges[name as keyof Limits] ?? [1, GREATEST_LIMIT];
    if (Number.isInteger(value) && value >= least && value <= most) continue;
    throw new Error(`limits.${name} must be a whole number from ${least} to ${most}, not ${value}`);
  }
}

function checkDefaultSubprotocol(options: CompleteOptions): void {
  const name = options.defaultSubprotocol;
  if (name === undefined || Object.hasOwn(options.subprotocols, name)) return;
  const names = Object.keys(options.subprotocols).join(", ");
  throw new Error(`the default subprotocol must be one of: ${names}; not '${name}'`);
}

function checkPort(port: number): void {
  if (Number.isInteger(port) && port >= 0 && port <= 65535) return;
  throw new Error(`a port must be a whole number from 0 to 65535, not ${port}`);
}

function parseHostname(hostname: string): string {
  if (hostname === "") throw new Error("a hostname must not be empty");
  return withoutBrackets(hostname);
}

/** An IPv6 address has brackets in a URL, but not where a runtime listens. */
function withoutBrackets(hostname: string): string {
  return hostname.replace(/^\[(.*)\]$/, "$1");
}

/**
 * Returns an origin as browsers send it, without a default port or a trailing slash (RFC 6454,
 * 6.2).
 */
function parseOrigin(text: string): string {
  if (text === "null") return text; // from a page opened as a file or in a sandboxed frame
  const url = URL.parse(text);
  if (url) {
    const origin = `${url.protocol}//${url.host}`; // url.origin knows fewer schemes
    const isOnlyOrigin = url.href === origin || url.href === `${origin}/`;
    const isSentByBrowsers = !/^(ws|wss|ftp|file):/.test(origin);
    if (isOnlyOrigin && isSentByBrowsers) return origin;
  }
  throw new Error(
    `an origin must be like https://example.org or http://localhost:9000, not '${text}'`,
  );
}

function checkTls(cert?: string, key?: string): void {
  if (cert === undefined && key === undefined) return;
  if (cert === undefined || key === undefined) {
    throw new Error("--cert and --key must be given together");
  }
  let isKeyOfCertificate: boolean;
  try {
    isKeyOfCertificate = new X509Certificate(cert).checkPrivateKey(createPrivateKey(key));
  } catch {
    throw new Error("--cert and --key must be a certificate and a private key in PEM");
  }
  if (!isKeyOfCertificate) throw new Error("the --key does not belong to the --cert");
}

// The log. It shows at most 100 lines in a tenth of a second, which is more than anybody can read,
// and counts the rest. So logging a flood of messages costs little. The log goes through `console`,
// because Deno Deploy and debuggers see nothing else.

const LOG_INTERVAL_MILLISECONDS = 100;
const MOST_LOG_LINES = 100; // in this time

const printLine = linePrinter(console.log);
const printError = linePrinter(console.error);

/** Returns a function that prints a line, or only counts it if there are too many. */
function linePrinter(print: (line: string) => void): (makeLine: () => string) => void {
  let printedLines = 0;
  let skippedLines = 0;

  function printSafely(line: string): void {
    try {
      print(line);
    } catch { // The disk is full, or nobody reads any more. That must not end the server.
    }
  }

  function resetCounts(): void {
    if (skippedLines > 0) printSafely(`(${skippedLines} more lines)`);
    printedLines = 0;
    skippedLines = 0;
  }

  return (makeLine) => {
    if (printedLines === 0) setTimeout(resetCounts, LOG_INTERVAL_MILLISECONDS);
    if (printedLines < MOST_LOG_LINES) {
      printedLines++;
      printSafely(makeLine());
    } else {
      skippedLines++;
    }
  };
}

/** Logs an error with its stack, even if the server is quiet. */
function report(where: string, error: unknown): void {
  printError(() => {
    const lines = `failed: ${where}\n${inspectSafely(error)}`.split("\n");
    return lines.map(escapeControls).join("\n  ");
  });
}

function inspectSafely(error: unknown): string {
  try {
    return inspect(error);
  } catch {
    return "(an error that cannot be shown)";
  }
}

/** Shows a message in the log: a text by its first 80 characters, bytes by their count. */
function preview(message: Message): string {
  if (typeof message !== "string") return `${message.length} bytes`;
  // A code point has one or two units, so 160 units hold at least 80 code points.
  const start = [...message.slice(0, 160)].slice(0, 80).join("");
  if (start.length === message.length) return escapeControls(start);
  return `${escapeControls(start)}… (length ${message.length})`;
}

/** What a client sends must not control the terminal, nor look like a line of the log. */
function escapeControls(text: string): string {
  return text.replace(/[\p{Cc}\p{Zl}\p{Zp}\p{Bidi_Control}]/gu, (character) => {
    return "\\u" + character.charCodeAt(0).toString(16).padStart(4, "0");
  });
}

/**
 * Joins a host and a port as in a URL. Bun may not know them if the client has left already. `join`
 * makes one flat string, while a template would keep its parts in memory, too.
 */
function hostPort(host = "unknown", port = 0): string {
  const name = host.includes(":") ? `[${host}]` : host;
  return [name, port].join(":");
}

// The command line.

interface Flag {
  /** What the help shows in place of a value; undefined if the flag has no value. */
  readonly placeholder?: string;
  readonly help: string;
  /**
   * Returns the options that the flag sets. `earlier` are those of the flags before it, since a
   * flag may be given several times.
   */
  readonly toOptions: (value: string, earlier: Options) => Options;
}

const flagTable: Record<string, Flag> = {
  port: {
    placeholder: "N",
    help: "listen on port N; 0: any free one (default: PORT, else 9000)",
    toOptions: (text) => ({ port: parsePort("--port", text) }),
  },
  hostname: {
    placeholder: "NAME",
    help: "listen on NAME (default: 0.0.0.0; :: adds IPv6)",
    toOptions: (hostname) => ({ hostname }),
  },
  default: {
    placeholder: "NAME",
    help: "the subprotocol for clients that offer none",
    toOptions: (defaultSubprotocol) => ({ defaultSubprotocol }),
  },
  origin: {
    placeholder: "URL",
    help: "only pages of this origin may connect (repeatable)",
    toOptions: (origin, { origins = [] }) => ({ origins: [...origins, origin] }),
  },
  cert: {
    placeholder: "FILE",
    help: "a certificate in PEM, for TLS (Deno: with --allow-read)",
    toOptions: (path) => ({ cert: readFileSync(path, "utf8") }),
  },
  key: {
    placeholder: "FILE",
    help: "the private key of the certificate in PEM",
    toOptions: (path) => ({ key: readFileSync(path, "utf8") }),
  },
  "reuse-port": {
    help: "share the port with other processes (Linux)",
    toOptions: () => ({ reusePort: true }),
  },
  quiet: {
    help: "log only the listening address and errors",
    toOptions: () => ({ quiet: true }),
  },
};

/** Starts a server that a signal stops. Throws an Error if it cannot start, or a flag is wrong. */
function main(args: string[]): void {
  if (args.includes("--help") || args.includes("-h")) return console.log(helpText());
  const options = parseFlags(args);
  options.port ??= environmentPort();
  const server = serve(options);
  stopOnSignal(server);
  // An exception in a timer or a promise of a subprotocol must not end the server.
  process.on("uncaughtException", (error) => report("uncaught exception", error));
  process.on("unhandledRejection", (error) => report("unhandled rejection", error));
  const scheme = options.cert ? "https" : "http";
  const host = hostPort(reachableHostname(options.hostname), server.port);
  printLine(() => `Listening on ${scheme}://${host}/`);
}

function helpText(): string {
  const names = Object.keys(subprotocols).join(", ");
  const flagLines = Object.entries(flagTable).map(([name, { placeholder, help }]) => {
    return helpLine(name, placeholder ? `${placeholder}: ${help}` : help);
  });
  return [
    "A WebSocket server; dumb-increment-protocol answers each message with the message reversed.",
    `Subprotocols: ${names}.`,
    "",
    ...flagLines,
    helpLine("help", "show this"),
  ].join("\n");
}

function helpLine(name: string, help: string): string {
  return `  --${name.padEnd(12)}${help}`;
}

function parseFlags(args: string[]): Options {
  let options: Options = {};
  for (const { name, value = "" } of splitFlags(args)) {
    const flag = flagTable[name];
    const isValueMissing = flag.placeholder !== undefined && value === "";
    if (isValueMissing) throw new Error(`--${name} needs a value`);
    options = { ...options, ...flag.toOptions(value, options) };
  }
  return options;
}

/** Returns the flags of a command line in their order, each with its value. */
function splitFlags(args: string[]): { name: string; value?: string }[] {
  const flagTypes = Object.entries(flagTable).map(([name, { placeholder }]) => {
    const type = placeholder ? "string" : "boolean";
    return [name, { type }] as const;
  });
  try {
    const { tokens } = parseArgs({ args, options: Object.fromEntries(flagTypes), tokens: true });
    return tokens.filter((token) => token.kind === "option");
  } catch (error) {
    // parseArgs calls a value that begins with a dash, such as -1, ambiguous. This says it clearly.
    const ambiguous = /^Option '(--[\w-]+).* argument is ambiguous/.exec((error as Error).message);
    if (!ambiguous) throw error;
    const [, flag] = ambiguous;
    throw new Error(`${flag} needs a value; if it begins with a dash, write ${flag}=VALUE`);
  }
}

function parsePort(source: "--port" | "PORT", text: string): number {
  if (!/^\d+$/.test(text)) throw new Error(`${source} must be a whole number, not '${text}'`);
  return Number(text);
}

/** Returns the port that PORT asks for; undefined if it is unset, empty, or may not be read. */
function environmentPort(): number | undefined {
  if (!runtime.canReadEnvironment("PORT")) {
    printError(() => "PORT is ignored, if set: Deno may not read it without --allow-env=PORT");
    return undefined;
  }
  const text = process.env.PORT;
  return text ? parsePort("PORT", text) : undefined;
}

/** A server that listens everywhere can be reached at localhost. */
function reachableHostname(hostname = defaultOptions.hostname): string {
  const name = withoutBrackets(hostname);
  return name === "0.0.0.0" || name === "::" ? "localhost" : name;
}

/**
 * Ctrl+C may arrive twice, from the terminal and from `deno task`. Within this time it counts once.
 */
const SAME_SIGNAL_MILLISECONDS = 500;

/** The first signal stops the server, a later one ends the process at once. */
function stopOnSignal(server: Server): void {
  let firstSignalTime: number | undefined;

  function onSignal(): void {
    if (firstSignalTime === undefined) {
      firstSignalTime = performance.now();
      server.stop().finally(() => process.exit(0));
    } else if (performance.now() - firstSignalTime > SAME_SIGNAL_MILLISECONDS) {
      process.exit(1);
    }
  }
  process.on("SIGINT", onSignal);
  process.on("SIGTERM", onSignal);
}

// ---- 6. The subprotocol on-demand ---------------------------------------------------------------
// A small language over messages, for tests of clients and proxies. Every number and every text has
// a limit here; `send` limits how much may be unread.

const HELP = "commands: close CODE REASON, delay MILLISECONDS TEXT, repeat TIMES TEXT, " +
  "bytes COUNT, headers, help";

let delayedCount = 0; // of all connections; 10,000 texts of 1000 characters take 10 to 20 MB

/** Does what a message asks for, such as "close 4001 bye". */
function onDemand(connection: Connection, handshake: Handshake): MessageHandler {
  const delayedTimers = new Set<Timer>();
  connection.onclose = () => {
    delayedTimers.forEach((timer) => clearTimeout(timer));
    delayedCount -= delayedTimers.size;
  };
  return (message) => {
    const { command, number, text } = parseCommand(message);
    if (command === "close") return closeOnDemand(connection, number, text);
    if (command === "delay") return delay(connection, delayedTimers, number, text);
    if (command === "repeat") return repeat(connection, number, text);
    if (command === "bytes") return zeroBytes(connection, number);
    if (command === "headers") return describeHandshake(handshake);
    return HELP;
  };
}

/**
 * Parses a command such as "delay 500 hello": a word, a whole number and a text. A missing number
 * is Infinity, which is more than any command allows.
 */
function parseCommand(message: Message): { command: string; number: number; text: string } {
  const line = typeof message === "string" ? message : "help";
  // The number must end at a space or at the end: "5x" is part of the text, and so is a number of
  // more than 15 digits.
  const parts = /^(?<command>\w+)(?: (?<digits>\d{1,15})(?= |$))?(?: (?<text>.*))?$/s.exec(line);
  if (!parts) return { command: "help", number: Infinity, text: "" };
  const { command, digits = "Infinity", text = "" } = parts.groups!;
  return { command, number: Number(digits), text };
}

function closeOnDemand(connection: Connection, code: number, reason: string): string | void {
  try {
    connection.close(code, reason);
  } catch (error) {
    return (error as RangeError).message; // it says which codes and reasons are allowed
  }
}

/** Sends a text after some milliseconds, unless the connection is closed by then. */
function delay(
  connection: Connection,
  delayedTimers: Set<Timer>,
  milliseconds: number,
  text: string,
): string | void {
  if (milliseconds > 60_000) return "delay MILLISECONDS TEXT: at most 60000 milliseconds";
  if (text.length > 1000) return "delay MILLISECONDS TEXT: a text of at most 1000 characters";
  if (delayedTimers.size >= 64) return "delay MILLISECONDS TEXT: 64 messages are delayed already";
  if (delayedCount >= 10_000) {
    return "delay MILLISECONDS TEXT: other clients delay too many messages";
  }
  const timer = setTimeout(() => {
    delayedTimers.delete(timer);
    delayedCount--;
    connection.send(text);
  }, milliseconds);
  delayedTimers.add(timer);
  delayedCount++;
}

/** Sends a text many times. The copies together may take half of `limits.unreadBytes`. */
function repeat(connection: Connection, times: number, text: string): string | void {
  const copyMemory = Buffer.byteLength(text) + DENO_MESSAGE_OVERHEAD_BYTES; // on Deno; less on Bun
  const mostTimes = Math.floor(connection.limits.unreadBytes / 2 / copyMemory);
  if (times > mostTimes) return `repeat TIMES TEXT: this text at most ${mostTimes} times`;
  for (let i = 0; i < times; i++) connection.send(text);
}

function zeroBytes(connection: Connection, length: number): Message {
  const { messageBytes } = connection.limits;
  if (length > messageBytes) return `bytes COUNT: at most ${messageBytes}`;
  return new Uint8Array(length);
}

/**
 * The scripts of a page may not read HttpOnly cookies and credentials, so they are not sent back.
 */
const HIDDEN_HEADERS = ["cookie", "authorization"];

function describeHandshake({ address, requestLine, headers }: Handshake): string {
  const shownHeaders = Object.fromEntries(headers);
  for (const name of HIDDEN_HEADERS) {
    if (headers.has(name)) shownHeaders[name] = "(hidden)";
  }
  return JSON.stringify({ address, request: requestLine, headers: shownHeaders });
}

// ---- 7. How a message is reversed ---------------------------------------------------------------
// This part has nothing to do with sockets. What a reader sees as one character, such as "é" or a
// flag, may be several units of a JavaScript string: a grapheme cluster (UAX #29). The clusters are
// reversed, not the units. `Intl.Segmenter` finds them, but takes 100 to 400 ns for each cluster;
// all else here takes 0.2 to 5 ns for each unit.
//
// So the segmenter is asked only where it is needed. Some units join their neighbours: combining
// marks, joiners, surrogates, Hangul jamo, CR. All others are called plain. Two plain units never
// join each other, but a unit that is not plain may join a plain one, as the mark of "e\u0308"
// joins its "e". So each cluster of several units has a unit that is not plain, and the segmenter
// is asked for the clusters of these units. The slowest text of 1 MiB that was found takes 0.2 s,
// in which no other client is served.

const segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });

/**
 * Returns a text's grapheme clusters in reverse order, as `Intl.Segmenter` finds them (UAX #29), or
 * bytes in reverse order. "noe\u0308l🇩🇪" becomes "🇩🇪le\u0308on". Reversing twice may not give the
 * original: "\n\r" becomes "\r\n", which is one cluster.
 */
export function reverse(message: Message): Message {
  if (typeof message !== "string") return message.toReversed();
  growScratch(message.length);
  return reverseAscii(message) ?? reverseClusters(message);
}

// The scratch memory, in which each text is reversed. It grows with the longest text, to six bytes
// for each unit, and never shrinks. These are three views of it: as bytes, as numbers of 8 bytes,
// as UTF-16 units.
let scratchBytes = Buffer.alloc(0);
let scratchNumbers = new DataView(scratchBytes.buffer);
let scratchUnits = new Uint16Array(0);

/**
 * Unused bytes before the views, so that these do not begin at the boundary of a memory page. A
 * long string does, and copying is slow if both begin at the same place in a page: making a string
 * of 64 KiB takes Bun 40 µs without these bytes, and 5 µs with them.
 */
const UNUSED_BYTES = 64;

/** Makes the scratch memory large enough for a text of so many units. */
function growScratch(unitCount: number): void {
  const neededBytes = 3 * unitCount + 8; // UTF-8 takes up to 3 bytes a unit; 8 are for the padding
  if (scratchBytes.length >= neededBytes) return;
  const memory = new ArrayBuffer(UNUSED_BYTES + 2 * neededBytes); // twice, so that growing is rare
  scratchBytes = Buffer.from(memory, UNUSED_BYTES);
  scratchNumbers = new DataView(memory, UNUSED_BYTES);
  scratchUnits = new Uint16Array(memory, UNUSED_BYTES);
}

/**
 * Reverses a text of ASCII without CR; returns undefined for any other. (The only cluster of two
 * ASCII characters is CR LF.)
 *
 * The text is written after up to 7 zero bytes, so that their length together is a multiple of 8.
 * They are taken as numbers of 8 bytes each. The first number changes places with the last, the
 * second with the last but one, and so on. Reading a number as little-endian and writing it as
 * big-endian reverses its bytes.
 *
 * The numbers are floats. Their bits stay as they are unless they make a NaN, which bytes of ASCII
 * never do. For 64 KiB, floats take 7 to 10 µs, BigInts 5 to 70 µs, the native reverse() 50 to 60
 * µs.
 */
function reverseAscii(text: string): string | undefined {
  const paddedLength = Math.ceil(text.length / 8) * 8;
  const padding = paddedLength - text.length;
  scratchNumbers.setFloat64(0, 0); // the zero bytes
  // In UTF-8, a text that is not ASCII takes more bytes than it has units.
  const byteCount = scratchBytes.write(text, padding);
  if (byteCount !== text.length || text.includes("\r")) return undefined;
  let left = 0;
  let right = paddedLength - 8;
  while (left <= right) {
    const leftNumber = scratchNumbers.getFloat64(left, true);
    const rightNumber = scratchNumbers.getFloat64(right, true);
    scratchNumbers.setFloat64(left, rightNumber, false);
    scratchNumbers.setFloat64(right, leftNumber, false);
    left += 8;
    right -= 8;
  }
  return scratchBytes.toString("latin1", 0, byteCount);
}

/**
 * Reverses any text. Each plain unit is put in its place. For a unit that is not plain, its whole
 * cluster is put in place. In "ne\u0308", for example, the "e" is first put in the middle. Then the
 * cluster "e\u0308" is copied to the first two places, over that "e".
 */
function reverseClusters(text: string): string {
  let segments: Intl.Segments | undefined; // made only if needed, since that takes time
  let index = 0;
  while (index < text.length) {
    if (isPlain(text, index)) {
      scratchUnits[text.length - 1 - index] = text.charCodeAt(index);
      index++;
      continue;
    }
    segments ??= segmenter.segment(text);
    const cluster = segments.containing(index)!;
    const end = cluster.index + cluster.segment.length;
    copyUnits(cluster.segment, text.length - end);
    index = end;
  }
  return scratchBytes.toString("utf16le", 0, 2 * text.length);
}

/** Copies the units of a cluster to a place in the scratch memory, in the same order. */
function copyUnits(cluster: string, place: number): void {
  for (let index = 0; index < cluster.length; index++) {
    scratchUnits[place + index] = cluster.charCodeAt(index);
  }
}

const UNKNOWN = 0;
const PLAIN = 1;
const NOT_PLAIN = 2;

/** For each unit whether it is plain. Surrogates are never plain. */
const unitKinds = new Uint8Array(0x10000).fill(NOT_PLAIN, 0xd800, 0xe000);

/**
 * Whether a unit is plain. The segmenter is asked the first time that a unit is met. By UAX #29, it
 * is enough to try the unit after an "a" (marks and joiners join it), beside itself (jamo join),
 * before an "a" (prepended marks join it) and before a line feed (CR joins it).
 */
function isPlain(text: string, index: number): boolean {
  const unit = text.charCodeAt(index);
  if (unitKinds[unit] === UNKNOWN) {
    const character = text[index];
    // The tests in their order: after "a", beside itself, before "a", before "\n".
    const probe = "a" + character + character + "a" + character + "\n";
    const clusterCount = [...segmenter.segment(probe)].length;
    unitKinds[unit] = clusterCount === probe.length ? PLAIN : NOT_PLAIN;
  }
  return unitKinds[unit] === PLAIN;
}

// ---- 8. The start, if this file is run as a program ---------------------------------------------

if (import.meta.main) {
  try {
    main(process.argv.slice(2));
  } catch (error) {
    const [reason] = (error as Error).message.split("\n");
    console.error(`Cannot start: ${reason} (see --help)`);
    process.exit(1);
  }
}
