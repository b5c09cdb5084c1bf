/** Lists by index, made when first needed. */
export function pushAt<T>(lists: T[][], index: number, value: T): void {
  const list = lists[index];
  if (list === undefined) lists[index] = [value];
  else list.push(value);
}
