/**
 * Measures for how long 10,000 messages block the page in Chromium, and a bare page with the same
 * field and a bare socket in the same run. The ratio of the two hardly depends on the machine.
 *
 *     bun .ci/page_bench.ts
 */
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { serve } from "../server.ts";

const MESSAGES = 10_000;
const RUNS = 3;
const chromium = process.env.CHROMIUM ?? "/usr/bin/chromium";

interface View {
  navigate(url: string): Promise<void>;
  evaluate(script: string): Promise<unknown>;
  close(): void;
}
const { Bun: bun } = globalThis as unknown as { Bun: { WebView: new (options: object) => View } };

/** Does the least that sending by a form takes, and shows only how many replies came. */
const barePage = `(async () => {
  document.body.innerHTML =
    "<textarea id=message></textarea><form id=form><button>Send</button></form><p id=count></p>";
  const socket = new WebSocket(location.href.replace("http", "ws"), "dumb-increment-protocol");
  let replies = 0;
  socket.onmessage = () => count.textContent = ++replies;
  form.onsubmit = (event) => {
    event.preventDefault();
    socket.send(message.value);
    message.value = "";
  };
  await new Promise((resolve) => socket.onopen = resolve);
})()`;

/** Sums up the tasks over 50 ms from the first message until the last reply is shown. */
const measure = (lastReplyShown: string) =>
  `(async () => {
  let blocked = 0;
  const add = ({ duration }) => blocked += duration;
  new PerformanceObserver((list) => list.getEntries().forEach(add)).observe({ type: "longtask" });
  await new Promise((resolve) => setTimeout(() => {
    for (let i = 0; i < ${MESSAGES}; i++) {
      message.value = "number " + i;
      form.requestSubmit();
    }
    resolve();
  }));
  while (!(${lastReplyShown})) await new Promise((resolve) => setTimeout(resolve, 20));
  await new Promise((resolve) => setTimeout(resolve, 100)); // the last entry comes a little later
  return blocked;
})()`;

async function blockedTime(url: string, preparation: string, lastReplyShown: string) {
  const argv = ["--no-sandbox", "--disable-background-networking", "--disable-sync"];
  const view = new bun.WebView({ backend: { type: "chrome", url: false, path: chromium, argv } });
  await view.navigate(url);
  await view.evaluate(preparation);
  await sleep(1000);
  const blocked = await view.evaluate(measure(lastReplyShown)) as number;
  view.close();
  return blocked;
}

const server = serve({ port: 0, hostname: "127.0.0.1", quiet: true });
const url = `http://localhost:${server.port}/`;
const lastReply = String(MESSAGES - 1).split("").reverse().join("");

console.log(`${MESSAGES} messages block for ... ms:`);
for (let run = 0; run < RUNS; run++) {
  // The bare page takes the place of the page, whose own socket goes with it.
  const bare = await blockedTime(`${url}bare`, barePage, `count.textContent === "${MESSAGES}"`);
  const page = await blockedTime(url, "0", `log.textContent.includes("${lastReply} rebmun")`);
  const ratio = (page / bare).toFixed(2);
  console.log(`page ${page.toFixed(0)}, bare page ${bare.toFixed(0)}, ratio ${ratio}`);
}
await server.stop();
process.exit(0);
