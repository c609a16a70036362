/**
 * Compares server.ts with a plain echo server on the same runtime and prints a table for the README.
 * `deno task bench` runs it, for Deno and for Bun. It takes about two minutes and needs Linux, which
 * shows the CPU time and the memory of a process in /proc.
 */
import { Buffer } from "node:buffer";
import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";

declare const Bun: { serve(options: object): { port: number } };

const SUBPROTOCOL = "dumb-increment-protocol";
const ROUNDS = 4;
const ROUND_MILLISECONDS = 500;
const IDLE_CONNECTIONS = 8000;

const ourFile = join(import.meta.dirname!, "..", "server.ts");
const echoFile = import.meta.filename!; // this file is also the echo server

// ---- The echo server ----------------------------------------------------------------------------

function serveEcho(): void {
  const hostname = "127.0.0.1";
  const port = typeof Bun === "undefined" ? serveOnDeno() : serveOnBun();
  console.log(`Listening on http://${hostname}:${port}/`);

  function serveOnDeno(): number {
    const server = Deno.serve({ hostname, port: 0, onListen() {} }, (request) => {
      const { socket, response } = Deno.upgradeWebSocket(request, { protocol: SUBPROTOCOL });
      socket.onmessage = ({ data }) => socket.send(data);
      return response;
    });
    return server.addr.port;
  }

  function serveOnBun(): number {
    const server = Bun.serve({
      hostname,
      port: 0,
      fetch: (request: Request, server: { upgrade(request: Request): boolean }) => {
        server.upgrade(request);
      },
      websocket: { message: (socket: WebSocket, data: string) => socket.send(data) },
    });
    return server.port;
  }
}

// ---- Processes ----------------------------------------------------------------------------------

type Runtime = "deno" | "bun";

const running = new Set<ChildProcess>();
process.on("exit", () => running.forEach((child) => child.kill("SIGKILL")));

/** A server in a process of its own. */
class ServerProcess {
  private constructor(readonly process: ChildProcess, readonly port: number) {}

  static async start(runtime: Runtime, file: string, args: string[]): Promise<ServerProcess> {
    const runtimeArgs = runtime === "deno" ? ["run", "-A"] : [];
    const child = spawn(runtime, [...runtimeArgs, file, ...args], {
      stdio: ["ignore", "pipe", "inherit"],
    });
    running.add(child);
    let output = "";
    for (;;) {
      const [chunk] = await once(child.stdout!, "data");
      output += chunk;
      const port = output.match(/^Listening on .*:(\d+)\/$/m)?.[1];
      if (!port) continue;
      child.stdout!.resume(); // reads the log and drops it
      return new ServerProcess(child, Number(port));
    }
  }

  /** The CPU time so far, in ticks of the kernel. */
  cpuTicks(): number {
    const stat = readFileSync(`/proc/${this.process.pid}/stat`, "utf8");
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" "); // from the third field on
    const userTicks = Number(fields[11]), systemTicks = Number(fields[12]);
    return userTicks + systemTicks;
  }

  residentKilobytes(): number {
    const status = readFileSync(`/proc/${this.process.pid}/status`, "utf8");
    return Number(status.match(/^VmRSS:\s+(\d+) kB$/m)![1]);
  }

  async stop(): Promise<void> {
    const exit = once(this.process, "exit");
    process.kill(this.process.pid!, "SIGKILL");
    await exit;
    running.delete(this.process);
  }
}

const startOurs = (runtime: Runtime) =>
  ServerProcess.start(runtime, ourFile, ["--port", "0", "--hostname", "127.0.0.1", "--quiet"]);
const startLogging = (runtime: Runtime) =>
  ServerProcess.start(runtime, ourFile, ["--port", "0", "--hostname", "127.0.0.1"]);
const startEcho = (runtime: Runtime) => ServerProcess.start(runtime, echoFile, ["--echo"]);

// ---- Clients ------------------------------------------------------------------------------------

async function openClients(port: number, count: number): Promise<WebSocket[]> {
  const clients: WebSocket[] = [];
  while (clients.length < count) {
    const batch = Array.from({ length: Math.min(100, count - clients.length) }, () => {
      return new WebSocket(`ws://127.0.0.1:${port}/`, SUBPROTOCOL);
    });
    await Promise.all(batch.map((client) => once(client, "open")));
    clients.push(...batch);
  }
  return clients;
}

async function closeClients(clients: WebSocket[]): Promise<void> {
  await Promise.all(clients.map((client) => {
    const closed = once(client, "close");
    client.close();
    return closed;
  }));
}

/** Lets each client send a text and wait for the reply, again and again; counts the replies. */
async function exchange(clients: WebSocket[], text: string): Promise<number> {
  const end = Date.now() + ROUND_MILLISECONDS;
  let replies = 0;
  await Promise.all(clients.map((client) =>
    new Promise<void>((resolve, reject) => {
      client.onmessage = () => {
        replies++;
        if (Date.now() < end) client.send(text);
        else resolve();
      };
      client.onclose = ({ code }) => reject(new Error(`closed with ${code}`));
      client.send(text);
    })
  ));
  for (const client of clients) client.onclose = null;
  return replies;
}

// ---- Figures ------------------------------------------------------------------------------------

type Start = (runtime: Runtime) => Promise<ServerProcess>;

/** Messages per second of CPU time of one server, relative to another. They take turns. */
async function compareSpeed(
  runtime: Runtime,
  [start, startBaseline]: [Start, Start],
  clientCount: number,
  text: string,
): Promise<number> {
  const servers = [await start(runtime), await startBaseline(runtime)];
  const groups = [];
  for (const { port } of servers) groups.push(await openClients(port, clientCount));
  const replies = [0, 0];
  const ticks = [0, 0];
  for (let round = -1; round < ROUNDS; round++) {
    for (const i of [0, 1]) {
      const ticksBefore = servers[i].cpuTicks();
      const count = await exchange(groups[i], text);
      if (round < 0) continue; // the first round only warms up
      replies[i] += count;
      ticks[i] += servers[i].cpuTicks() - ticksBefore;
    }
  }
  for (const clients of groups) await closeClients(clients);
  for (const server of servers) await server.stop();
  return (replies[0] / ticks[0]) / (replies[1] / ticks[1]);
}

/** Memory of idle connections of one server, relative to another. */
async function compareMemory(runtime: Runtime, starts: [Start, Start]): Promise<number> {
  const kilobytes = [];
  for (const start of starts) {
    const server = await start(runtime);
    await closeClients(await openClients(server.port, 100)); // the first ones load code
    const before = server.residentKilobytes();
    const clients = await openClients(server.port, IDLE_CONNECTIONS);
    await sleep(1000);
    kilobytes.push(server.residentKilobytes() - before);
    await closeClients(clients);
    await server.stop();
  }
  return kilobytes[0] / kilobytes[1];
}

/** Repeats a sample up to a size in bytes. */
function textOf(sample: string, size: number): string {
  const repeated = Buffer.from(sample.repeat(Math.ceil(size / sample.length)));
  return repeated.subarray(0, size).toString(); // a character that is cut becomes U+FFFD
}

const ascii = "The quick brown fox jumps over the lazy dog, 0123456789. ";
const plainScripts = "Žluťoučký kůň úpěl ďábelské ódy. Быстрая лиса 日本語のテキスト 안녕하세요 ";
const emojiAndMarks = "Žluťoučký kůň 👨‍👩‍👧 e\u0301 日本語 🇨🇿 ";

const toEcho: [Start, Start] = [startOurs, startEcho];
const speed = (clients: number, sample: string, size: number) => (runtime: Runtime) =>
  compareSpeed(runtime, toEcho, clients, textOf(sample, size));

const figures: Record<string, (runtime: Runtime) => Promise<number>> = {
  "speed, 100 clients, 16 B": speed(100, ascii, 16),
  "speed, 100 clients, 1 KiB of ASCII": speed(100, ascii, 1024),
  "speed, 100 clients, 1 KiB of plain scripts": speed(100, plainScripts, 1024),
  "speed, 100 clients, 1 KiB with emoji and marks": speed(100, emojiAndMarks, 1024),
  "speed, 20 clients, 64 KiB of ASCII": speed(20, ascii, 64 * 1024),
  "speed, 4 clients, 1 MiB of ASCII": speed(4, ascii, 1024 * 1024),
  "speed with the log, relative to `--quiet`": (runtime) =>
    compareSpeed(runtime, [startLogging, startOurs], 100, textOf(ascii, 16)),
  [`memory of ${IDLE_CONNECTIONS} idle connections`]: (runtime) => compareMemory(runtime, toEcho),
};

async function printTable(): Promise<void> {
  const runtimes: Runtime[] = ["deno", "bun"];
  console.log(`| relative to a plain echo on the same runtime | Deno | Bun |\n| --- | --: | --: |`);
  for (const [name, measure] of Object.entries(figures)) {
    const cells = [];
    for (const runtime of runtimes) {
      const isInstalled = spawnSync(runtime, ["--version"]).status === 0;
      cells.push(isInstalled ? (await measure(runtime)).toFixed(2) : "not installed");
    }
    console.log(`| ${name} | ${cells.join(" | ")} |`);
  }
}

if (process.argv.includes("--echo")) serveEcho();
else await printTable();
