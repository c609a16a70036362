/**
 * A WebSocket server for Deno and Bun that answers each message with the message reversed.
 *
 * Read it from the top; the parts follow the way of the data. (1) The subprotocols and the limits.
 * (2) A request becomes a page, a refusal or a connection. (3) A connection. (4) Deno and Bun side by
 * side. (5) How the server starts and stops. (6) How a message is reversed.
 */
import { Buffer } from "node:buffer";
import { createPrivateKey, hash, X509Certificate } from "node:crypto";
import { readFileSync } from "node:fs";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { inspect, parseArgs } from "node:util";
import indexHtml from "./index.html" with { type: "text" };

// ---- 1. What the server says --------------------------------------------------------------------
// Many subprotocols live on one port, each independent of the others. A client names the one that it
// wants to speak. A subprotocol is a function: it is called with each new connection and returns the
// function that answers the messages of this connection.

/** The text of a text message, or the bytes of a binary message. */
export type Message = string | Uint8Array<ArrayBuffer>;

/** Returns the reply to a message, or nothing for no reply. Must not be async. */
export type MessageHandler = (message: Message) => Message | void;

/**
 * Begins a conversation: returns what answers the messages of this connection, or nothing if they
 * need no answer. Must not be async. If it or the handler throws, the connection is closed with 1011.
 */
export type Subprotocol = (connection: Connection, handshake: Handshake) => MessageHandler | void;

/** From the name of a subprotocol to the subprotocol. To add one, add an entry. */
export const subprotocols: Record<string, Subprotocol> = {
  "dumb-increment-protocol": () => reverse,
  "echo": () => (message) => message,
  "count": count,
  "chat": chat,
  "on-demand": onDemand,
};

/** Sends "1", "2", "3", one a second. The message "reset" starts again. */
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

/** Does what a message asks for, such as "close 4001 bye". For tests of clients and proxies. */
function onDemand(connection: Connection, handshake: Handshake): MessageHandler {
  const delayedTimers = new Set<Timer>();
  connection.onclose = () => delayedTimers.forEach((timer) => clearTimeout(timer));

  return (message) => {
    const { command, number, text } = parseCommand(String(message));
    switch (command) {
      case "close":
        return closeOnDemand(connection, number, text);
      case "delay":
        return delay(connection, delayedTimers, number, text);
      case "repeat":
        return repeat(connection, number, text);
      case "bytes":
        return zeroBytes(connection, number);
      case "headers":
        return describeHandshake(handshake);
      default:
        return "commands: close CODE REASON, delay MILLISECONDS TEXT, repeat TIMES TEXT, " +
          "bytes COUNT, headers, help";
    }
  };
}

/** Parses "delay 500 hello" as command, number and text. A number that is missing is Infinity. */
function parseCommand(message: string): { command: string; number: number; text: string } {
  const parts = /^(\w+)(?: (\d+)(?= |$))?(?: (.*))?$/s.exec(message);
  const [, command = "help", digits = "Infinity", text = ""] = parts ?? [];
  return { command, number: Number(digits), text };
}

function closeOnDemand(connection: Connection, code: number, reason: string): string | void {
  try {
    connection.close(code, reason);
  } catch (error) {
    return (error as RangeError).message; // it says which codes and reasons are allowed
  }
}

/** Sends a text after some milliseconds, unless the connection has ended by then. */
function delay(connection: Connection, timers: Set<Timer>, milliseconds: number, text: string) {
  if (milliseconds > 60_000) return "delay MILLISECONDS TEXT: at most 60000 milliseconds";
  if (text.length > 1000) return "delay MILLISECONDS TEXT: a text of at most 1000 characters";
  if (timers.size >= 64) return "delay MILLISECONDS TEXT: 64 messages are delayed already";
  const timer = setTimeout(() => {
    timers.delete(timer);
    connection.send(text);
  }, milliseconds);
  timers.add(timer);
}

function repeat(connection: Connection, times: number, text: string): string | void {
  const mostTimes = Math.floor(connection.limits.unreadBytes / 2 / queuedSize(text));
  if (times > mostTimes) return `repeat TIMES TEXT: this text at most ${mostTimes} times`;
  for (let i = 0; i < times; i++) connection.send(text);
}

function zeroBytes(connection: Connection, count: number): Message {
  const { messageBytes } = connection.limits;
  if (count > messageBytes) return `bytes COUNT: at most ${messageBytes}`;
  return new Uint8Array(count);
}

function describeHandshake(handshake: Handshake): string {
  const headers = Object.fromEntries(handshake.headers);
  return JSON.stringify({ ...handshake, headers });
}

/** The limits of a server. `serve({ limits: { ... } })` replaces some of them. */
export const limits = {
  /** The longest message, in bytes (of text: of UTF-8). A longer one closes with 1009. */
  messageBytes: 1024 * 1024,
  /** The memory for what one client has not read yet. A client over it is closed with 1008. */
  unreadBytes: 20 * 1024 * 1024,
  /** The memory for what all clients have not read yet. Over it, those with a backlog are closed. */
  allUnreadBytes: 128 * 1024 * 1024,
  /** Connections at the same time. Further handshakes are refused with 503. */
  connections: 10_000,
  /** Seconds until a connection without a sign of life is ended. A pong is a sign of life. */
  idleSeconds: 108, // Deno needs a whole message as a sign: 1 MiB takes 84 s at 100 kbit/s
  /** Seconds that a stopping server waits for its clients to answer the close frame. */
  stopSeconds: 1,
};

export type Limits = typeof limits;

/** The least and the greatest value of some limits. The others may be 1 to 2 ** 40. */
const limitRanges: { [Name in keyof Limits]?: [least: number, most: number] } = {
  messageBytes: [1, 64 * 1024 * 1024 - 1], // Deno cuts a frame of 64 MiB without a close frame
  idleSeconds: [8, 960], // Bun accepts no others
  stopSeconds: [0, 3600],
};

/** Deno needs about so much memory for each queued message, besides its bytes. */
const QUEUED_MESSAGE_BYTES = 1024;

/** The memory that a message takes while a client has not read it. */
function queuedSize(message: Message): number {
  return Buffer.byteLength(message) + QUEUED_MESSAGE_BYTES;
}

// ---- 2. How a request becomes a page, a refusal or a connection ---------------------------------
// A WebSocket begins with an HTTP request, the handshake. The server answers it with status 101, and
// from then on the two sides exchange messages over the same TCP connection. The handshake is checked
// here, before the runtime looks at it, so that Deno and Bun refuse the same with the same words. Only
// what a runtime refuses by itself never comes here: two Host headers, a handshake with a body (Deno),
// HTTP/1.1 without Host, an unknown method, OPTIONS * (Bun). HTTP/1.0 cannot be told from HTTP/1.1.

/** A handshake as it arrived. A proxy on the way may have changed it. */
export interface Handshake {
  /** The IP address and port of the client or, behind a proxy, of the proxy. */
  readonly address: string;
  /** The request line, such as "GET /path HTTP/1.1". */
  readonly request: string;
  readonly headers: Headers;
}

/** Answers a request: with the page, a refusal, or the connection to which it is to be upgraded. */
function answer(request: Request, address: string, state: ServerState): Response | Connection {
  const { method, headers } = request;
  const header = (name: string) => headers.get(name) ?? "";

  const url = URL.parse(request.url);
  const isHostValid = /^[\w.:[\]-]*$/.test(header("host"));
  if (!url || !isHostValid) return textResponse(400, "The URL or the Host header is not valid.");

  // A proxy may have removed one of the two headers.
  const isHandshake = hasToken(header("upgrade"), "websocket") || headers.has("sec-websocket-key");
  if (!isHandshake) {
    const isAllowed = method === "GET" || method === "HEAD";
    if (!isAllowed) return textResponse(405, "Use GET.", { allow: "GET, HEAD" });
    if (url.pathname !== "/") return textResponse(404, "The page is at /.");
    return new Response(page, { headers: pageHeaders });
  }

  // Browsers do not tell why a handshake was refused, so the log does.
  function refuse(status: number, reason: string, moreHeaders?: Record<string, string>): Response {
    state.log?.(() => `refused: ${address}, ${status}, ${reason}`);
    return textResponse(status, reason, moreHeaders);
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
    return refuse(400, "A handshake must not have a body.");
  }
  if (headers.has("origin") && state.origins?.includes(header("origin")) === false) {
    return refuse(403, "Pages of this origin may not connect.");
  }
  const subprotocol = selectSubprotocol(headers.get("sec-websocket-protocol"), state);
  if (!subprotocol) {
    const names = Object.keys(state.subprotocols).join(", ");
    return refuse(400, `Sec-WebSocket-Protocol must offer one of: ${names}.`);
  }
  if (header("sec-websocket-version") !== "13") {
    const version = { "sec-websocket-version": "13" }; // section 4.2.2: the one that we speak
    return refuse(426, "Sec-WebSocket-Version must be 13.", version);
  }
  if (!/^[A-Za-z0-9+/]{22}==$/.test(header("sec-websocket-key"))) {
    return refuse(400, "Sec-WebSocket-Key must be 16 bytes in base64.");
  }
  if (state.isStopping || state.connections.length >= state.limits.connections) {
    return refuse(503, "The server is full or about to stop.", { "retry-after": "10" });
  }

  const requestLine = `GET ${url.pathname}${url.search} HTTP/1.1`;
  return new Connection(subprotocol, { address, request: requestLine, headers }, state);
}

/** Selects the first offered subprotocol that the server speaks. Names are compared exactly. */
function selectSubprotocol(offers: string | null, state: ServerState): string | undefined {
  if (offers === null) return state.defaultSubprotocol;
  const selected = splitList(offers).find((name) => Object.hasOwn(state.subprotocols, name));
  // The name out of the table, since the one out of the header would keep the header in memory.
  return Object.keys(state.subprotocols).find((name) => name === selected);
}

function hasToken(header: string, token: string): boolean {
  return splitList(header).some((item) => item.toLowerCase() === token);
}

/** Splits a header at its commas; blanks and tabs around an item do not count (RFC 9110, 5.6.1). */
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

// The page may use its own style and script and open WebSockets, and nothing else.
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

/** Gives the hash of the page's only style or script, in the form that a policy has. */
function contentHash(element: "style" | "script"): string {
  const start = page.indexOf(">", page.indexOf(`<${element}`)) + 1;
  const content = page.slice(start, page.indexOf(`</${element}>`));
  return `'sha256-${hash("sha256", content, "base64")}'`;
}

// ---- 3. A connection ----------------------------------------------------------------------------
// A connection calls its subprotocol and keeps one client from harming the others. An exception ends
// only the connection that it came from. So does a client that does not read: what it has not read
// waits in the server's memory. To keep a sender from filling that memory is called backpressure. Bun
// can stop reading from a client until the client has read its replies; Deno cannot (part 4 has both).
// What neither can hold back, such as a chat, is bounded in `send`: a client with too much unread is
// closed.

type Timer = ReturnType<typeof setTimeout>;

/** What a connection needs of a runtime's socket. */
interface Socket {
  /** Sends a message, or queues it. */
  send(message: Message): void;
  /** The memory that the queued messages take, in bytes. */
  unreadBytes(): number;
  /** Sends a close frame, after what is queued. */
  close(code: number, reason: string): void;
}

/** What the connections of one server share. */
interface ServerState {
  readonly limits: Limits;
  readonly subprotocols: Record<string, Subprotocol>;
  readonly defaultSubprotocol?: string;
  readonly origins?: string[];
  /** Logs a line; undefined if the server is quiet. */
  readonly log?: (line: () => string) => void;
  /**
   * All connections until their TCP connection has ended: also those that were closed before. An array
   * takes 100 bytes less for each connection than a Set.
   */
  readonly connections: Connection[];
  /** The sum of what the connections have left unread, each as it was when last measured. */
  unreadBytes: number;
  isStopping: boolean;
}

/** A client may leave this much unread even when all together leave too much. */
const SMALL_BACKLOG_BYTES = 64 * 1024;

const UNREAD_REASON = "too many unread messages";

/** One connection with a client, the same on both runtimes. */
export class Connection {
  /** Is called once, when the client has left or the server has closed the connection. */
  onclose?: () => void;

  /** The name of the subprotocol. */
  readonly subprotocol: string;

  /** The IP address and port of the client or, behind a proxy, of the proxy. */
  readonly address: string;

  readonly #state: ServerState;
  #handshake?: Handshake; // until it opens
  #socket?: Socket; // since it opened
  #handler?: MessageHandler;
  #isOpen = false;
  #unreadBytes = 0; // when last measured

  constructor(subprotocol: string, handshake: Handshake, state: ServerState) {
    this.subprotocol = subprotocol;
    this.address = handshake.address;
    this.#handshake = handshake;
    this.#state = state;
  }

  /** The limits of the server. */
  get limits(): Limits {
    return this.#state.limits;
  }

  /**
   * Sends a message; does nothing once the connection is closed. A client that has left more unread
   * than `limits.unreadBytes` is closed with 1008 instead. Throws a TypeError if it is no message.
   */
  send(message: Message): void {
    this.#send(message);
    this.#logAfterwards(() => `sending data: ${preview(message)}`);
  }

  /**
   * Closes the connection. Throws a RangeError if a close frame may not hold the code, or if the
   * reason is longer than 123 bytes in UTF-8 (RFC 6455 sections 7.4 and 5.5).
   */
  close(code = 1000, reason = ""): void {
    checkClose(code, reason);
    if (!this.#isOpen) return;
    this.#markClosed(code);
    this.#socket?.close(code, reason);
  }

  // The runtimes in part 4 call the next three.

  /** The handshake is done. */
  opened(socket: Socket): void {
    const { connections, limits, subprotocols, isStopping } = this.#state;
    const handshake = this.#handshake!;
    this.#handshake = undefined; // its headers need not stay in memory
    this.#socket = socket;
    this.#isOpen = true;
    connections.push(this);
    this.#state.log?.(() => `connected: ${this.address}, ${this.subprotocol}`);
    if (isStopping) return this.close(1001, STOP_REASON);
    if (connections.length > limits.connections) return this.close(1013, "try again later");
    try {
      const handler = subprotocols[this.subprotocol](this, handshake);
      checkNotAsync(handler);
      this.#handler = handler ?? undefined;
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
      if (reply !== undefined) this.#send(reply);
      this.#state.log?.(() => `received data: ${preview(message)}, replying: ${preview(reply)}`);
    } catch (error) {
      this.#state.log?.(() => `received data: ${preview(message)}, failing`);
      this.#fail(error, message);
    }
  }

  /** The TCP connection has ended. Deno may tell so twice. */
  ended(code: number): void {
    if (this.#isOpen) this.#markClosed(code);
    this.#setUnread(0);
    const { connections } = this.#state;
    const index = connections.indexOf(this);
    if (index >= 0) connections.splice(index, 1);
  }

  #send(message: Message): void {
    if (typeof message !== "string" && !(message instanceof Uint8Array)) {
      throw new TypeError("a message must be a string or a Uint8Array");
    }
    if (!this.#isOpen) return;
    if (this.#hasTooMuchUnread()) return this.close(1008, UNREAD_REASON);
    this.#socket!.send(message);
    this.#measureUnread();
  }

  /** The figures may be old, so they are measured again before a client is closed. */
  #hasTooMuchUnread(): boolean {
    const { limits, connections } = this.#state;
    if (this.#unreadBytes > limits.unreadBytes) this.#measureUnread();
    if (this.#unreadBytes > limits.unreadBytes) return true;

    if (this.#unreadBytes <= SMALL_BACKLOG_BYTES) return false;
    if (this.#state.unreadBytes <= limits.allUnreadBytes) return false;
    for (const connection of connections) connection.#measureUnread();
    return this.#state.unreadBytes > limits.allUnreadBytes;
  }

  #measureUnread(): void {
    this.#setUnread(this.#socket!.unreadBytes());
  }

  #setUnread(unreadBytes: number): void {
    this.#state.unreadBytes += unreadBytes - this.#unreadBytes;
    this.#unreadBytes = unreadBytes;
  }

  /** An exception in a subprotocol ends its connection and nothing else. */
  #fail(error: unknown, message?: Message): void {
    const cause = message === undefined ? "" : `, message: ${preview(message)}`;
    report(`${this.address}, ${this.subprotocol}${cause}`, error);
    this.close(1011, "internal error");
  }

  /** Nothing is received or sent any more, though the TCP connection may stay for a while. */
  #markClosed(code: number): void {
    this.#isOpen = false;
    this.#logAfterwards(() => `closed: ${this.address}, code ${code}`);
    queueMicrotask(() => {
      // `onclose` is called a moment later, since a subprotocol may close before it has set it.
      try {
        checkNotAsync(this.onclose?.());
      } catch (error) {
        report(`${this.address}, ${this.subprotocol}, onclose`, error);
      }
    });
  }

  /** What a message causes is logged after the line of the message. */
  #logAfterwards(line: () => string): void {
    const { log } = this.#state;
    if (log) queueMicrotask(() => log(line));
  }
}

/** Throws if a close frame may not hold the code or the reason (RFC 6455 sections 7.4 and 5.5). */
function checkClose(code: number, reason: string): void {
  const isRegistered = (code >= 1000 && code <= 1003) || (code >= 1007 && code <= 1014);
  const isPrivate = code >= 3000 && code <= 4999;
  const isCode = Number.isInteger(code) && (isRegistered || isPrivate);
  if (isCode && Buffer.byteLength(reason) <= 123) return;
  const rule = "the code must be 1000 to 1003, 1007 to 1014 or 3000 to 4999, " +
    "and the reason at most 123 bytes long";
  throw new RangeError(`close: ${rule}`);
}

/** Throws if a subprotocol has given a promise, for which nobody would wait. */
function checkNotAsync(result: unknown): void {
  if (!(result instanceof Promise)) return;
  result.catch((error) => report("a promise of a subprotocol", error));
  throw new TypeError("a subprotocol's functions must not be async; use connection.send later");
}

// ---- 4. The two runtimes, side by side ----------------------------------------------------------
// Both ask `answer` about each request. They send a Response as it is. For a Connection they upgrade
// the request, and tell the connection what happens to its socket.

/** Where and how a runtime listens. */
interface ListenOptions {
  readonly port: number;
  readonly hostname: string;
  readonly reusePort: boolean;
  readonly tls?: { readonly cert: string; readonly key: string };
}

/** A server as a runtime runs it. */
interface RuntimeServer {
  readonly port: number;
  stop(): Promise<void>;
}

interface Runtime {
  /** Starts a server. Throws if the port is in use. */
  listen(options: ListenOptions, state: ServerState): RuntimeServer;
  /** Whether a variable of the environment can be read without asking the user. */
  canReadEnvironment(variable: string): boolean;
}

// Deno.

const denoRuntime: Runtime = {
  listen: listenOnDeno,
  canReadEnvironment: (variable) =>
    Deno.permissions.querySync({ name: "env", variable }).state === "granted",
};

function listenOnDeno(options: ListenOptions, state: ServerState): RuntimeServer {
  const { hostname, reusePort, tls } = options;
  let isStopped = false;
  let server = listen(options.port);
  const { port } = server.addr;
  return { port, stop };

  function listen(port: number): Deno.HttpServer<Deno.NetAddr> {
    const denoOptions = { port, hostname, reusePort, ...tls, onListen() {} };
    const server = Deno.serve(denoOptions, handleRequest);
    server.finished.catch(listenAgain);
    return server;
  }

  /** Deno stops listening when no file descriptors are left. Open connections go on. */
  async function listenAgain(): Promise<void> {
    await sleep(50);
    if (isStopped) return;
    try {
      server = listen(port);
    } catch {
      await listenAgain();
    }
  }

  function stop(): Promise<void> {
    isStopped = true;
    return server.shutdown();
  }

  function handleRequest(request: Request, info: Deno.ServeHandlerInfo<Deno.NetAddr>): Response {
    const address = hostPort(info.remoteAddr.hostname, info.remoteAddr.port);
    const result = answer(request, address, state);
    if (result instanceof Response) return result;
    const { socket: webSocket, response } = upgradeOnDeno(request, result);
    const socket = new DenoSocket(webSocket, result);
    // Listeners take 1 KB less for each connection than onopen, onmessage and onclose.
    webSocket.addEventListener("open", () => socket.opened(), { once: true });
    webSocket.addEventListener("message", ({ data }) => socket.received(data));
    webSocket.addEventListener("close", ({ code }) => socket.closed(code));
    return response;
  }
}

/**
 * Deno finds the subprotocol only among offers that are spelt "a, b", as browsers spell them. For
 * other spellings the header is set afterwards. Deno 2.5, which Deno Deploy documents, does not allow
 * that, so there such clients get no subprotocol. Deno 2.9 always allows it: once Deno Deploy has
 * that, `protocol` can go.
 */
function upgradeOnDeno(request: Request, connection: Connection): Deno.WebSocketUpgrade {
  const { subprotocol, limits } = connection;
  const offers = request.headers.get("sec-websocket-protocol");
  const isFoundByDeno = offers?.split(", ").includes(subprotocol);
  const protocol = isFoundByDeno ? subprotocol : undefined;
  const upgrade = Deno.upgradeWebSocket(request, { protocol, idleTimeout: limits.idleSeconds });
  if (offers !== null && !isFoundByDeno) {
    try {
      upgrade.response.headers.set("sec-websocket-protocol", subprotocol);
    } catch { // Deno 2.5
    }
  }
  return upgrade;
}

/** While a connection is closing: so often it is checked whether its client has read everything. */
const CLOSE_CHECK_MILLISECONDS = 20;

/** A client that has read nothing for so long is not waited for. */
const CLOSE_PATIENCE_MILLISECONDS = 500;

/** Deno reads all that a client sends, and queues all that the client does not read. */
class DenoSocket implements Socket {
  readonly #webSocket: WebSocket;
  readonly #connection: Connection;
  #queuedSizes: number[] = []; // of the messages that may still wait, the oldest first
  #queuedSum = 0; // of these sizes
  #closing?: Closing; // from close() until the close frame is sent
  #lostBytes = 0; // unread when the close frame was sent

  constructor(webSocket: WebSocket, connection: Connection) {
    this.#webSocket = webSocket;
    this.#connection = connection;
  }

  opened(): void {
    this.#connection.opened(this);
  }

  /** Deno has no limit for the size of a message, so it is checked here. */
  received(data: string | ArrayBuffer): void {
    if (this.#closing) return this.#receivedLate(this.#closing);
    if (Buffer.byteLength(data) > this.#connection.limits.messageBytes) {
      return this.#connection.close(1009, "message too big");
    }
    this.#connection.received(typeof data === "string" ? data : new Uint8Array(data));
  }

  /**
   * Deno has the code 0 for an end without a close frame. If it cut a client that had not read
   * everything, it keeps that in memory until the client leaves, but does not tell when that is. So
   * such a connection counts for a while longer.
   */
  closed(code: number): void {
    const end = () => this.#connection.ended(code || 1006);
    if (this.#lostBytes === 0) return end();
    Deno.unrefTimer(setTimeout(end, this.#connection.limits.idleSeconds * 1000));
  }

  send(message: Message): void {
    const size = Buffer.byteLength(message);
    this.#queuedSizes.push(size);
    this.#queuedSum += size;
    this.#webSocket.send(message);
  }

  /**
   * Deno tells how many bytes wait, but not in how many messages. Messages leave in order, so the
   * bytes that have left are those of the oldest messages. That an empty message has left is known
   * only when a later one has.
   */
  unreadBytes(): number {
    if (this.#lostBytes > 0) return this.#lostBytes;
    let leftSum = this.#queuedSum - this.#webSocket.bufferedAmount;
    while (leftSum > 0 && leftSum >= this.#queuedSizes[0]) {
      const size = this.#queuedSizes.shift()!;
      leftSum -= size;
      this.#queuedSum -= size;
    }
    return this.#queuedSum + this.#queuedSizes.length * QUEUED_MESSAGE_BYTES;
  }

  /**
   * Once Deno has been told to close, it cuts the connection at the next message that arrives, and
   * the client may never get the close frame. So the frame is sent when the client has read
   * everything and is silent, or when it has not read for a while.
   */
  close(code: number, reason: string): void {
    const deadline = Date.now() + CLOSE_PATIENCE_MILLISECONDS;
    this.#closing = { code, reason, deadline, unreadBytes: Infinity, isSilent: true };
    setTimeout(() => this.#checkClosing(), CLOSE_CHECK_MILLISECONDS);
  }

  #checkClosing(): void {
    const closing = this.#closing;
    if (!closing) return;
    const unreadBytes = this.#webSocket.bufferedAmount;
    if (unreadBytes === 0 && closing.isSilent) return this.#sendCloseFrame(closing);
    if (Date.now() > closing.deadline) return this.#sendCloseFrame(closing);

    const hasRead = unreadBytes < closing.unreadBytes;
    if (hasRead) closing.deadline = Date.now() + CLOSE_PATIENCE_MILLISECONDS;
    closing.unreadBytes = unreadBytes;
    closing.isSilent = true;
    setTimeout(() => this.#checkClosing(), CLOSE_CHECK_MILLISECONDS);
  }

  /** A flood may leave Deno no time for timers, so the deadline is checked here, too. */
  #receivedLate(closing: Closing): void {
    closing.isSilent = false;
    if (Date.now() > closing.deadline) this.#sendCloseFrame(closing);
  }

  #sendCloseFrame({ code, reason }: Closing): void {
    this.#closing = undefined;
    if (this.#webSocket.bufferedAmount > 0) this.#lostBytes = this.unreadBytes();
    this.#webSocket.close(code, reason);
  }
}

/** What DenoSocket remembers until it sends the close frame. */
interface Closing {
  readonly code: number;
  readonly reason: string;
  /** When the frame is sent even if the client has not read everything. */
  deadline: number;
  /** What was unread at the last check. */
  unreadBytes: number;
  /** Whether no message has come since the last check. */
  isSilent: boolean;
}

// Bun. The little of its types that is needed:

declare const Bun: { serve(options: object): { port: number; stop(now: boolean): Promise<void> } };

interface BunServer {
  upgrade(request: Request, options: { headers: HeadersInit; data: BunSocket }): boolean;
  requestIP(request: Request): { address: string; port: number } | null;
}

interface BunWebSocket {
  readonly data: BunSocket;
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

function listenOnBun(options: ListenOptions, state: ServerState): RuntimeServer {
  const { port, hostname, reusePort, tls } = options;
  const websocket = {
    maxPayloadLength: state.limits.messageBytes,
    idleTimeout: state.limits.idleSeconds,
    backpressureLimit: 0, // no limit: beyond one, Bun drops messages without a word
    open: (webSocket: BunWebSocket) => webSocket.data.opened(webSocket),
    message: (webSocket: BunWebSocket, message: Message) => webSocket.data.received(message),
    drain: (webSocket: BunWebSocket) => webSocket.data.drained(),
    close: (webSocket: BunWebSocket, code: number, reason: string) =>
      webSocket.data.closed(code, reason),
  };
  const bunOptions = { port, hostname, reusePort, tls, http2: tls !== undefined };
  const server = Bun.serve({ ...bunOptions, development: false, fetch: handleRequest, websocket });
  return { port: server.port, stop: () => server.stop(true) };

  function handleRequest(request: Request, server: BunServer): Response | undefined {
    const client = server.requestIP(request);
    const result = answer(request, hostPort(client?.address, client?.port), state);
    if (result instanceof Response) return result;
    const isOffered = request.headers.has("sec-websocket-protocol");
    const headers = new Headers();
    if (isOffered) headers.set("sec-websocket-protocol", result.subprotocol);
    const isUpgraded = server.upgrade(request, { headers, data: new BunSocket(result) });
    if (!isUpgraded) return textResponse(400, "Bun has refused the handshake.");
  }
}

/**
 * Bun can stop reading from a client until the client has read its replies. So the client has to
 * wait, and the queue does not grow.
 */
class BunSocket implements Socket {
  readonly #connection: Connection;
  #webSocket?: BunWebSocket; // since it opened
  #pauseTimer?: Timer; // while Bun does not read
  #heldMessages?: Message[]; // that Bun had read before the pause

  constructor(connection: Connection) {
    this.#connection = connection;
  }

  opened(webSocket: BunWebSocket): void {
    this.#webSocket = webSocket;
    webSocket.binaryType = "uint8array";
    this.#connection.opened(this);
  }

  received(message: Message): void {
    if (this.#pauseTimer === undefined) return this.#connection.received(message);
    this.#heldMessages ??= [];
    this.#heldMessages.push(message);
  }

  /** Bun calls a message over the limit code 1006 here, though it has sent 1009 to the client. */
  closed(code: number, reason: string): void {
    clearTimeout(this.#pauseTimer);
    this.#connection.ended(reason === "Received too big message" ? 1009 : code);
  }

  send(message: Message): void {
    this.#webSocket!.send(message);
    if (this.#mustPause()) this.#pause();
  }

  #mustPause(): boolean {
    const { unreadBytes } = this.#connection.limits;
    return this.unreadBytes() > Math.min(SMALL_BACKLOG_BYTES, unreadBytes / 2);
  }

  /** Bun's idle timeout rests during a pause, so the pause has a timer of its own. */
  #pause(): void {
    // When Bun 1.4.5 can send only a part of what is queued, it reads again and forgets the pause.
    this.#webSocket!.resume();
    this.#webSocket!.pause();
    const { idleSeconds } = this.#connection.limits;
    const closeIdle = () => this.#connection.close(1008, UNREAD_REASON);
    this.#pauseTimer ??= setTimeout(closeIdle, idleSeconds * 1000);
  }

  /** The client has read some of what was queued. */
  drained(): void {
    clearTimeout(this.#pauseTimer);
    this.#pauseTimer = undefined;
    this.#receiveHeldMessages();
    if (this.#mustPause()) this.#pause();
    else this.#webSocket!.resume();
  }

  #receiveHeldMessages(): void {
    const heldMessages = this.#heldMessages ?? [];
    let receivedCount = 0;
    while (receivedCount < heldMessages.length && !this.#mustPause()) {
      this.#connection.received(heldMessages[receivedCount]);
      receivedCount++;
    }
    heldMessages.splice(0, receivedCount);
  }

  unreadBytes(): number {
    return this.#webSocket!.getBufferedAmount();
  }

  close(code: number, reason: string): void {
    this.#webSocket!.close(code, reason);
  }
}

const runtime = typeof Bun === "undefined" ? denoRuntime : bunRuntime;

// ---- 5. How the server starts and stops ---------------------------------------------------------
// `serve` starts a server for a program, `main` for the command line.

/** The options of {@linkcode serve}. */
export interface Options {
  /** The port to listen on, 0 to 65535. 0 is any free one. Default: 9000. */
  port?: number;
  /** The name or IP address to listen on. Default: 0.0.0.0, all of IPv4. "::" is IPv6, too. */
  hostname?: string;
  /** Whether other processes may listen on the same port (Linux). Default: false. */
  reusePort?: boolean;
  /** A certificate in PEM, so that the server speaks TLS. Default: none. */
  cert?: string;
  /** The private key of the certificate in PEM. Default: none. */
  key?: string;
  /**
   * The origins whose pages may connect, such as "https://example.org". Default: all origins. Clients
   * that send no Origin header are not browsers; this option does not restrict them.
   */
  origin?: string[];
  /** The subprotocol for clients that offer none. Default: none; such clients are refused. */
  defaultSubprotocol?: string;
  /** Whether only errors are logged. Default: false. */
  quiet?: boolean;
  /** The subprotocols to speak. Default: {@linkcode subprotocols}. */
  subprotocols?: Record<string, Subprotocol>;
  /** The limits that differ from {@linkcode limits}. */
  limits?: Partial<Limits>;
}

/** A running server. */
export interface Server {
  /** The port on which it listens. */
  readonly port: number;
  /** Closes all connections with 1001 and frees the port. */
  stop(): Promise<void>;
}

const DEFAULT_PORT = 9000; // the tutorial's
const DEFAULT_HOSTNAME = "0.0.0.0";
const STOP_REASON = "the server is stopping";

/** Starts a server. Throws an Error if it cannot listen, or if an option is wrong. */
export function serve(options: Options = {}): Server {
  const state: ServerState = {
    limits: checkLimits({ ...limits, ...options.limits }),
    subprotocols: options.subprotocols ?? subprotocols,
    defaultSubprotocol: options.defaultSubprotocol,
    origins: options.origin?.map(parseOrigin),
    log: options.quiet ? undefined : log,
    connections: [],
    unreadBytes: 0,
    isStopping: false,
  };
  checkDefaultSubprotocol(state);
  const listenOptions = {
    port: checkPort(options.port ?? DEFAULT_PORT),
    hostname: withoutBrackets(options.hostname ?? DEFAULT_HOSTNAME),
    reusePort: options.reusePort ?? false,
    tls: checkTls(options.cert, options.key),
  };
  const runtimeServer = tryToListen(listenOptions, state);

  async function stop(): Promise<void> {
    state.isStopping = true;
    for (const connection of [...state.connections]) connection.close(1001, STOP_REASON);
    const deadline = Date.now() + state.limits.stopSeconds * 1000;
    while (state.connections.length > 0 && Date.now() < deadline) await sleep(10);
    // Deno would wait for a request that never becomes whole.
    await Promise.race([runtimeServer.stop(), sleep(100)]);
  }
  return { port: runtimeServer.port, stop };
}

function tryToListen(options: ListenOptions, state: ServerState): RuntimeServer {
  try {
    return runtime.listen(options, state);
  } catch (error) {
    const { code, message } = error as Error & { code?: string };
    if (code === "EADDRINUSE") {
      throw new Error(`port ${options.port} is in use; try another --port`);
    }
    const where = hostPort(options.hostname, options.port);
    throw new Error(`cannot listen on ${where}; check --hostname and --port: ${message}`);
  }
}

function checkLimits(limits: Limits): Limits {
  for (const [name, value] of Object.entries(limits)) {
    const [least, most] = limitRanges[name as keyof Limits] ?? [1, 2 ** 40];
    if (Number.isInteger(value) && value >= least && value <= most) continue;
    throw new Error(`limits.${name} must be a whole number from ${least} to ${most}, not ${value}`);
  }
  return limits;
}

function checkDefaultSubprotocol({ defaultSubprotocol, subprotocols }: ServerState): void {
  if (defaultSubprotocol === undefined || Object.hasOwn(subprotocols, defaultSubprotocol)) return;
  const names = Object.keys(subprotocols).join(", ");
  throw new Error(`the default subprotocol must be one of: ${names}; not '${defaultSubprotocol}'`);
}

function checkPort(port: number): number {
  if (Number.isInteger(port) && port >= 0 && port <= 65535) return port;
  throw new Error(`a port must be a whole number from 0 to 65535, not ${port}`);
}

/** An IPv6 address has brackets in a URL, but not where a runtime listens. */
function withoutBrackets(hostname: string): string {
  return hostname.replace(/^\[(.*)\]$/, "$1");
}

/** Gives an origin as browsers send it, without a default port or a last slash (RFC 6454, 6.2). */
function parseOrigin(text: string): string {
  if (text === "null") return text; // of a page that was opened as a file
  const url = URL.parse(text);
  const origin = `${url?.protocol}//${url?.host}`;
  const isOrigin = url?.href === origin || url?.href === `${origin}/`;
  const isSentByBrowsers = !/^(ws|wss|ftp|file):/.test(origin);
  if (isOrigin && isSentByBrowsers) return origin;
  throw new Error(
    `an origin must be like https://example.org or http://localhost:9000, not '${text}'`,
  );
}

function checkTls(cert?: string, key?: string): ListenOptions["tls"] {
  if (cert === undefined && key === undefined) return undefined;
  if (!cert || !key) throw new Error("--cert and --key must be given together, each with a file");
  let isKeyOfCertificate: boolean;
  try {
    isKeyOfCertificate = new X509Certificate(cert).checkPrivateKey(createPrivateKey(key));
  } catch {
    throw new Error("--cert and --key must be a certificate and a private key in PEM");
  }
  if (!isKeyOfCertificate) throw new Error("the --key does not belong to the --cert");
  return { cert, key };
}

// The log shows at most 100 lines in a tenth of a second, which is more than anybody can read, and
// counts the rest. So a flood of messages costs little. It goes through `console`, because Deno Deploy
// and debuggers see nothing else.

const log = linePrinter(console.log);
const logError = linePrinter(console.error);

/** Makes a function that prints a line, or only counts it if there are too many. */
function linePrinter(print: (line: string) => void): (line: () => string) => void {
  let shownLines = 0;
  let skippedLines = 0;

  function printSafely(line: string): void {
    try {
      print(line);
    } catch { // The disk is full, or nobody reads any more. That must not end the server.
    }
  }

  function startAgain(): void {
    if (skippedLines > 0) printSafely(`(${skippedLines} more lines)`);
    shownLines = 0;
    skippedLines = 0;
  }

  return (line) => {
    if (shownLines === 0) setTimeout(startAgain, 100);
    if (shownLines < 100) {
      shownLines++;
      printSafely(line());
    } else {
      skippedLines++;
    }
  };
}

/** Logs an error with its stack, also if the server is quiet. */
function report(where: string, error: unknown): void {
  logError(() => {
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

/** Shows a message in the log: a text by its first 80 characters, bytes by their number. */
function preview(message: Message | void): string {
  if (message === undefined) return "(nothing)";
  if (typeof message !== "string") return `${message.length} bytes`;
  const start = [...message.slice(0, 160)].slice(0, 80).join(""); // a character has one or two units
  if (start.length === message.length) return escapeControls(start);
  return `${escapeControls(start)}… (length ${message.length})`;
}

/** What a client sends must not steer the terminal, nor look like a line of the log. */
function escapeControls(text: string): string {
  return text.replace(/[\p{Cc}\p{Zl}\p{Zp}\p{Bidi_Control}]/gu, (character) => {
    return "\\u" + character.charCodeAt(0).toString(16).padStart(4, "0");
  });
}

/** Joins a host and a port as in a URL. */
function hostPort(host = "unknown", port = 0): string {
  const name = host.includes(":") ? `[${host}]` : host;
  return [name, port].join(":");
}

/** The options of the command line, with their help. */
const flagTable = {
  port: { type: "string", help: "N: listen on port N; 0: any free one (default: PORT, else 9000)" },
  hostname: { type: "string", help: "NAME: listen on NAME (default: 0.0.0.0; with IPv6: ::)" },
  default: { type: "string", help: "NAME: the subprotocol for clients that offer none" },
  origin: { type: "string", multiple: true, help: "URL: only its pages may connect (repeatable)" },
  cert: { type: "string", help: "FILE: a certificate in PEM, for TLS (Deno: with --allow-read)" },
  key: { type: "string", help: "FILE: the private key of the certificate in PEM" },
  "reuse-port": { type: "boolean", help: "share the port with other processes (Linux)" },
  quiet: { type: "boolean", help: "log only errors" },
  help: { type: "boolean", short: "h", help: "show this" },
} as const;

/** Runs a server until a signal stops it. Throws an Error if the command line is wrong. */
function main(args: string[]): void {
  if (args.includes("--help") || args.includes("-h")) return console.log(helpText());
  const flags = parseFlags(args);
  const port = parsePort(flags.port ?? environmentPort() ?? String(DEFAULT_PORT));
  const server = serve({
    port,
    hostname: flags.hostname,
    reusePort: flags["reuse-port"],
    cert: readFile(flags.cert),
    key: readFile(flags.key),
    origin: flags.origin,
    defaultSubprotocol: flags.default,
    quiet: flags.quiet,
  });
  stopOnSignal(server);
  process.on("uncaughtException", (error) => report("uncaught exception", error));
  process.on("unhandledRejection", (error) => report("unhandled rejection", error));
  const scheme = flags.cert ? "https" : "http";
  log(() => `Listening on ${scheme}://${hostPort(shownHostname(flags.hostname), server.port)}/`);
}

function helpText(): string {
  const lines = Object.entries(flagTable).map(([name, { help }]) =>
    `  --${name.padEnd(12)}${help}`
  );
  return ["A WebSocket server that answers each message with the message reversed.", "", ...lines]
    .join("\n");
}

function parseFlags(args: string[]) {
  const { values } = parseArgsClearly(args);
  for (const [name, value] of Object.entries(values)) {
    if (value === "") throw new Error(`--${name} needs a value`);
  }
  return values;
}

/** parseArgs calls a value that begins with a dash, such as -1, ambiguous. This says what is wrong. */
function parseArgsClearly(args: string[]) {
  try {
    return parseArgs({ args, options: flagTable });
  } catch (error) {
    const ambiguous = /^Option '(--[\w-]+).* argument is ambiguous/.exec((error as Error).message);
    if (!ambiguous) throw error;
    throw new Error(`${ambiguous[1]} needs a value, which may not begin with a dash`);
  }
}

function parsePort(text: string): number {
  if (!/^\d{1,5}$/.test(text)) throw new Error(`a port is a number from 0 to 65535, not '${text}'`);
  return Number(text);
}

/** Gives the port that the environment asks for; an empty one is none. */
function environmentPort(): string | undefined {
  if (runtime.canReadEnvironment("PORT")) return process.env.PORT || undefined;
  logError(() => "PORT is not looked at: Deno may not read it without --allow-env=PORT");
}

function readFile(path: string | undefined): string | undefined {
  return path === undefined ? undefined : readFileSync(path, "utf8");
}

/** A server that listens everywhere can be reached at localhost. */
function shownHostname(hostname = DEFAULT_HOSTNAME): string {
  const name = withoutBrackets(hostname);
  return name === "0.0.0.0" || name === "::" ? "localhost" : name;
}

/** Ctrl+C may arrive twice, from the terminal and from `deno task`: within this time it is one. */
const SAME_SIGNAL_MILLISECONDS = 500;

/** The first signal stops the server, a later one ends the process at once. */
function stopOnSignal(server: Server): void {
  let firstSignalTime: number | undefined;

  function onSignal(): void {
    if (firstSignalTime === undefined) {
      firstSignalTime = Date.now();
      server.stop().then(() => process.exit(0));
    } else if (Date.now() - firstSignalTime > SAME_SIGNAL_MILLISECONDS) {
      process.exit(1);
    }
  }
  process.on("SIGINT", onSignal);
  process.on("SIGTERM", onSignal);
}

if (import.meta.main) {
  try {
    main(process.argv.slice(2));
  } catch (error) {
    const [reason] = (error as Error).message.split("\n");
    console.error(`Cannot start: ${reason} (see --help)`);
    process.exit(1);
  }
}

// ---- 6. How a message is reversed ---------------------------------------------------------------
// This part has nothing to do with sockets. What a reader sees as one character, such as "é" or a
// flag, may be several units of a JavaScript string: a grapheme cluster (UAX #29). The clusters are
// reversed, not the units. `Intl.Segmenter` finds them, at 100 to 400 ns a unit; all else here takes
// 0.2 to 5 ns a unit. So the segmenter is asked only about those parts of a text that are not plain.

const segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });

/**
 * Gives a text's grapheme clusters in reverse order, as `Intl.Segmenter` finds them (UAX #29), or
 * bytes in reverse order. "noe\u0308l🇩🇪" becomes "🇩🇪le\u0308on". To reverse twice need not give the
 * same text again: "\n\r" becomes "\r\n", which is one cluster.
 */
export function reverse(message: Message): Message {
  if (typeof message !== "string") return message.toReversed();
  growBuffers(message.length);
  return reverseAscii(message) ?? reverseClusters(message);
}

// A text is taken apart in `source` and put together in `target`. Both are seen as bytes and as numbers
// of 8 bytes, `target` as UTF-16 units, too. They grow with the longest text so far. `source` begins
// with 8 zeros (see `reverseAscii`).
let source = Buffer.alloc(0);
let target = Buffer.alloc(0);
let sourceNumbers = new DataView(source.buffer);
let targetNumbers = new DataView(target.buffer);
let targetUnits = new Uint16Array(target.buffer, 0, 0);

/**
 * `target` does not begin where its memory begins. The memory and a new string of 64 KiB both begin at
 * the border of a memory page, and to copy between two such places took Bun 33 µs instead of 5 µs.
 */
const TARGET_OFFSET = 512;

/** Makes room for a text of so many units, and for 16 bytes more (see `reverseAscii`). */
function growBuffers(unitCount: number): void {
  const size = 2 * unitCount + 16;
  if (target.length >= size) return;
  const targetMemory = new ArrayBuffer(TARGET_OFFSET + 2 * size);
  source = Buffer.alloc(2 * size);
  target = Buffer.from(targetMemory, TARGET_OFFSET);
  sourceNumbers = new DataView(source.buffer);
  targetNumbers = new DataView(targetMemory, TARGET_OFFSET);
  targetUnits = new Uint16Array(targetMemory, TARGET_OFFSET);
}

/**
 * Reverses a text of ASCII; gives undefined for any other. ASCII takes one byte a unit in UTF-8, all
 * else takes more. The only cluster of two ASCII characters is CR LF.
 *
 * Eight bytes at a time are read as a number whose last byte comes first (little-endian) and written
 * with its first byte first, from the end of the text to its beginning. The last number may begin in
 * the 8 zeros, which land behind the text. Numbers of ASCII are never NaN, whose bits might change.
 * For 64 KiB this loop takes 7 to 15 µs, the native reverse() 13 to 55 µs.
 */
function reverseAscii(text: string): string | undefined {
  const byteCount = source.write(text, 8);
  if (byteCount !== text.length || text.includes("\r")) return undefined;
  for (let written = 0; written < byteCount; written += 8) {
    const eightBytes = sourceNumbers.getFloat64(byteCount - written, true);
    targetNumbers.setFloat64(written, eightBytes);
  }
  return target.toString("latin1", 0, byteCount);
}

/**
 * Reverses any text. A unit that is not plain is moved together with the whole cluster that it is in,
 * which may have begun before it.
 */
function reverseClusters(text: string): string {
  let segments: Intl.Segments | undefined; // most texts need none, and to make them takes time
  let index = 0;
  while (index < text.length) {
    if (isPlain(text, index)) {
      targetUnits[text.length - 1 - index] = text.charCodeAt(index);
      index++;
      continue;
    }
    segments ??= segmenter.segment(text);
    const cluster = segments.containing(index)!;
    const end = cluster.index + cluster.segment.length;
    copyUnits(cluster.segment, text.length - end);
    index = end;
  }
  return target.toString("utf16le", 0, 2 * text.length);
}

/** Copies the units of a cluster to a place in `target`, in the same order. */
function copyUnits(cluster: string, place: number): void {
  for (let index = 0; index < cluster.length; index++) {
    targetUnits[place + index] = cluster.charCodeAt(index);
  }
}

const PLAIN = 1;
const NOT_PLAIN = 2; // 0 is not known yet

// Halves of an emoji are never plain. The rest is found out when it is first met.
const kinds = new Uint8Array(0x10000).fill(NOT_PLAIN, 0xd800, 0xe000);

/**
 * Whether a unit is plain. Two plain units side by side never share a cluster. Not plain are marks,
 * joiners, jamo, CR and whatever else forms a cluster with itself, an "a" or a line feed.
 */
function isPlain(text: string, index: number): boolean {
  const unit = text.charCodeAt(index);
  if (kinds[unit] === 0) {
    const probe = `a${text[index]}${text[index]}a${text[index]}\n`;
    const clusterCount = [...segmenter.segment(probe)].length;
    kinds[unit] = clusterCount === probe.length ? PLAIN : NOT_PLAIN;
  }
  return kinds[unit] === PLAIN;
}
