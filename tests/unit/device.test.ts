/** Which device a command runs on, from what the probe and the build's record say: no card is needed. */
import { describe, expect, it } from "vitest";
import { chooseDevice, type DeviceOption, type MachineFacts, visibleCards } from "../../src/device.js";
import type { StromaError } from "../../src/errors.js";
import type { ProbeReport } from "../../src/native.js";

const gpu = (index: number, more: Partial<ProbeReport["gpus"][number]> = {}) => ({
  index,
  name: `NVIDIA RTX A500${index}`,
  uuid: `GPU-${index}aaa-bbb`,
  memoryBytes: 24e9,
  freeBytes: 23e9,
  computeCapability: "8.6",
  ...more,
});
const probe = (gpus: ProbeReport["gpus"], cuda: string | null = "13.0"): ProbeReport =>
  ({
    gpus,
    driver: cuda === null ? null : { version: "580.1", cuda },
    nvmlError: gpus.length > 0 ? null : "the driver shows no GPU",
  }) as ProbeReport;
const CUDA = { version: "2.14.1+cu130", cuda: "13.0" };
const CPU = { version: "2.13.0+cpu", cuda: null };
const pod: MachineFacts = { probe: probe([gpu(0), gpu(1)]), build: CUDA };
const choose = (asked: DeviceOption | undefined, facts: MachineFacts, how = {}) =>
  chooseDevice(asked, how, () => facts);

describe("auto", () => {
  it.each<[string, MachineFacts, string, RegExp]>([
    ["two cards", pod, "cuda:0", /^NVIDIA RTX A5000, the first of 2 cards$/],
    ["one", { ...pod, probe: probe([gpu(0)]) }, "cuda:0", /^NVIDIA RTX A5000$/],
    [
      "the first that can be used",
      { ...pod, probe: probe([gpu(0, { computeCapability: "7.5" }), gpu(1)]) },
      "cuda:1",
      /^NVIDIA RTX A5001, the first of 2/,
    ],
    ["the CPU build", { ...pod, build: CPU }, "cpu", /^2 cards are here, and this is the CPU build$/],
    ["no build", { ...pod, build: null }, "cpu", /not built/],
    ["no driver", { probe: probe([], null), build: CUDA }, "cpu", /^there is no NVIDIA driver$/],
    ["no card", { probe: probe([]), build: CUDA }, "cpu", /^the driver shows no card/],
    ["no probe", { probe: null, build: CUDA }, "cpu", /nothing can count the cards/],
    ["none shown", { ...pod, visible: "" }, "cpu", /CUDA_VISIBLE_DEVICES= shows no card/],
    [
      "an old driver",
      { ...pod, probe: probe([gpu(0)], "12.4") },
      "cpu",
      /runs CUDA 12.4, and this build is for CUDA 13/,
    ],
    ["old cards", { ...pod, probe: probe([gpu(0, { computeCapability: "7.5" })]) }, "cpu", /capability 7.5/],
  ])("%s: %#", (_what, facts, device, why) => {
    for (const asked of [undefined, "auto"] as const) {
      const choice = choose(asked, facts);
      expect([choice.device, choice.why]).toEqual([device, expect.stringMatching(why)]);
    }
  });

  it("of a driver that runs a newer CUDA, the card", () => {
    expect(choose("auto", { ...pod, probe: probe([gpu(0)], "14.1") }).device).toBe("cuda:0");
  });

  it("where the card has no room for what must be on it, the processors", () => {
    expect(choose("auto", pod, { needsBytes: 22e9 }).device).toBe("cuda:0");
    expect(choose("auto", pod, { needsBytes: 26e9 })).toEqual({
      device: "cpu",
      why: "the model's 26 GB are more than cuda:0 has free",
    });
    expect(choose("cuda", pod, { needsBytes: 26e9 }).device).toBe("cuda:0");
  });

  it("of several ranks the processors, and nobody is asked for cards", () => {
    const never = () => {
      throw new Error("asked");
    };
    expect(chooseDevice("auto", { ranks: true }, never).device).toBe("cpu");
    for (const device of ["cpu", "sim"] as const)
      expect(chooseDevice(device, {}, never)).toEqual({ device, why: null });
  });
});

describe("a card that is asked for", () => {
  it.each<[DeviceOption, string]>([
    ["cuda", "cuda:0"],
    ["cuda:0", "cuda:0"],
    ["cuda:1", "cuda:1"],
  ])("%s", (asked, device) => {
    expect(choose(asked, pod).device).toBe(device);
    expect(choose(asked, pod).why === null).toBe(asked !== "cuda");
  });

  it.each<[DeviceOption, MachineFacts, StromaError["code"], string]>([
    ["cuda:2", pod, "CONFIG", "there is no cuda:2: this machine has cuda:0 to cuda:1"],
    ["cuda:1", { ...pod, visible: "1" }, "CONFIG", "this machine has cuda:0 alone"],
    ["cuda", { ...pod, build: CPU }, "NOT_SET_UP", "this is the CPU build. Run `npx stroma setup --cuda`"],
    ["cuda:0", { probe: probe([], null), build: CUDA }, "NOT_SET_UP", "Install an NVIDIA driver that runs CUDA 13.0"],
    ["cuda", { probe: probe([]), build: CUDA }, "CONFIG", "the driver shows no card (the driver shows no GPU)"],
    ["cuda", { probe: null, build: CUDA }, "NOT_SET_UP", "Run `npx stroma setup`"],
    ["cuda", { ...pod, probe: probe([gpu(0)], "12.4") }, "NOT_SET_UP", "libtorch for CUDA 12"],
    [
      "cuda:0",
      { ...pod, probe: probe([gpu(0, { computeCapability: "7.0" }), gpu(1)]) },
      "CONFIG",
      "cuda:0 (NVIDIA RTX A5000) cannot be used: it is of compute capability 7.0",
    ],
    ["gpu" as DeviceOption, pod, "INVALID_ARGUMENT", "expected auto, cpu, cuda, cuda:<n> or sim"],
  ])("%s: %#", (asked, facts, code, text) => {
    expect(() => choose(asked, facts)).toThrow(
      expect.objectContaining({ code, message: expect.stringContaining(text) }),
    );
  });

  it("is no word for several ranks, which name theirs", () => {
    expect(() => choose("cuda", pod, { ranks: true })).toThrow("--gpus N gives each its own");
    expect(choose("cuda:1", pod, { ranks: true }).device).toBe("cuda:1");
  });
});

describe("cards as CUDA counts them", () => {
  const names = (visible: string | undefined) => visibleCards({ ...pod, visible }).map((c) => [c.device, c.name]);
  const [A, B] = ["NVIDIA RTX A5000", "NVIDIA RTX A5001"];

  it.each([
    [undefined, [A, B]],
    ["1", [B]],
    ["1,0", [B, A]],
    ["GPU-1aaa", [B]],
    ["GPU-0aaa-bbb, GPU-1aaa-bbb", [A, B]],
    ["0,GPU-9", [A]],
    ["0,2,1", [A]],
    ["MIG-7", [null]],
    ["NoDevFiles", []],
  ])("%s", (visible, expected) => {
    expect(names(visible)).toEqual(expected.map((name, n) => [`cuda:${n}`, name]));
  });
});
