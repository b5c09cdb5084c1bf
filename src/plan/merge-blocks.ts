/**
 * The same model in fewer, larger blocks: runs of repeated layers become one block each, so that fewer boundaries wait from
 * forward to backward. Same operators in the same order, hence the same numbers; only the places where autograd is cut
 * differ. Parameters keep their names.
 */
import type { Arg, Block, Graph, Node, Program, Source } from "../graph/types.js";
import { validateGraph } from "../graph/validate.js";

/**
 * `graph` with up to `size` consecutive blocks of one program merged, where nothing but the next one reads a block. Blocks
 * that draw random numbers stay as they are: their draws are keyed by block. Returns `graph` itself where nothing merges.
 */
export function mergeBlocks(graph: Graph, size: number): Graph {
  const groups = groupsOf(graph, size);
  if (groups.length === graph.blocks.length) return graph;
  const at = new Map<number, number>();
  for (const [g, group] of groups.entries()) for (const b of group) at.set(b, g);
  const programs: Program[] = [];
  const known = new Map<string, number>();
  const blocks = groups.map((group): Block => {
    const merged = mergeOne(graph, group);
    const key = `${graph.blocks[group[0]!]!.program} x ${group.length} ${merged.wiring}`;
    let program = known.get(key);
    if (program === undefined) {
      program = programs.push(merged.program) - 1;
      known.set(key, program);
    }
    const inputs = merged.inputs.map((s): Source => ("block" in s ? { ...s, block: at.get(s.block)! } : s));
    return { name: merged.name, program, inputs, parameters: merged.parameters };
  });
  const moved = <T extends { block: number }>(list: T[]): T[] => list.map((x) => ({ ...x, block: at.get(x.block)! }));
  const result: Graph = {
    ...graph,
    programs,
    blocks,
    parameters: graph.parameters.map((p) => ({ ...p, owner: at.get(p.owner)! })),
    losses: moved(graph.losses),
    outputs: moved(graph.outputs),
  };
  validateGraph(result);
  return result;
}

function groupsOf(graph: Graph, size: number): number[][] {
  const readers = graph.blocks.map(() => new Set<number>());
  for (const [b, block] of graph.blocks.entries())
    for (const s of block.inputs) if ("block" in s) readers[s.block]!.add(b);
  const named = new Set([...graph.losses, ...graph.outputs].map((x) => x.block));
  const uses = new Map<string, number>();
  for (const p of graph.blocks.flatMap((b) => b.parameters)) uses.set(p, (uses.get(p) ?? 0) + 1);
  const alone = (b: number): boolean => {
    const block = graph.blocks[b]!;
    return block.inputs.some((s) => "rngKey" in s) || block.parameters.some((p) => uses.get(p)! > 1);
  };
  const groups: number[][] = [];
  for (const [b, block] of graph.blocks.entries()) {
    const group = groups.at(-1);
    const last = group?.at(-1);
    const joins =
      group !== undefined &&
      last !== undefined &&
      group.length < size &&
      graph.blocks[last]!.program === block.program &&
      [...readers[last]!].every((r) => r === b) &&
      !named.has(last) &&
      !alone(b) &&
      !alone(last);
    if (joins) group.push(b);
    else groups.push([b]);
  }
  return groups;
}

function mergeOne(graph: Graph, group: readonly number[]) {
  const members = group.map((b) => ({
    b,
    block: graph.blocks[b]!,
    program: graph.programs[graph.blocks[b]!.program]!,
  }));
  const inputs: Source[] = [];
  const inputSpecs: Program["inputs"] = [];
  const keys: string[] = [];
  /** By member: each of its inputs as a merged input (>= 0) or an output of an earlier member (~output). */
  const wired = members.map(({ block, program }, m) =>
    block.inputs.map((s, i) => {
      if (m > 0 && "block" in s && group.includes(s.block)) return { member: group.indexOf(s.block), output: s.output };
      const key = JSON.stringify(s);
      const found = keys.indexOf(key);
      if (found >= 0) return found;
      keys.push(key);
      inputs.push(s);
      const spec = program.inputs[i]!;
      const name = inputSpecs.some((x) => x.name === spec.name) ? `${m}.${spec.name}` : spec.name;
      return inputSpecs.push({ ...spec, name }) - 1;
    }),
  );
  const parameters = members.flatMap(({ program }, m) =>
    program.parameters.map((p) => ({ ...p, name: group.length === 1 ? p.name : `${m}.${p.name}` })),
  );
  let next = inputSpecs.length + parameters.length;
  let parameter = inputSpecs.length;
  const ids: number[][] = [];
  const nodes: Node[] = [];
  for (const [m, { program }] of members.entries()) {
    const id = wired[m]!.map((w) =>
      typeof w === "number" ? w : ids[w.member]![members[w.member]!.program.outputs[w.output]!.value]!,
    );
    for (const _ of program.parameters) id.push(parameter++);
    ids.push(id);
    for (const node of program.nodes) {
      for (const o of node.outputs) if (o !== null) id[o] = next++;
      nodes.push(renumbered(node, id));
    }
  }
  const last = members.at(-1)!;
  const outputs = last.program.outputs.map((o) => ({ ...o, value: ids.at(-1)![o.value]! }));
  const first = members[0]!;
  const program: Program =
    group.length === 1
      ? first.program
      : {
          name: `${group.length} x ${first.program.name}`,
          inputs: inputSpecs,
          parameters,
          nodes,
          outputs,
          values: next,
        };
  return {
    program,
    wiring: JSON.stringify(wired),
    inputs: group.length === 1 ? first.block.inputs : inputs,
    parameters: members.flatMap(({ block }) => block.parameters),
    name: group.length === 1 ? first.block.name : `${first.block.name}..${last.block.name.split(".").at(-1)}`,
  };
}

function renumbered(node: Node, id: readonly number[]): Node {
  const arg = (a: Arg): Arg =>
    "value" in a
      ? { value: id[a.value]! }
      : "values" in a
        ? { values: a.values.map((v) => (v === null ? null : id[v]!)) }
        : a;
  return {
    ...node,
    args: node.args.map(arg),
    ...(node.kwargs === undefined
      ? {}
      : { kwargs: Object.fromEntries(Object.entries(node.kwargs).map(([k, a]) => [k, arg(a)])) }),
    outputs: node.outputs.map((o) => (o === null ? null : id[o]!)),
  };
}
