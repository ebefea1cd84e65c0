// Two Logstores, one under a customer's key. Does what it is told on standard input, a word a line.
'use strict';

const { client, createLogstore, find, put } = require('./sdk');
const readline = require('readline');

const project = 'keys';
const it = client();
const texts = async (logstore) => (await find(it, project, logstore, '*')).map((log) => log.text);
// The SDK tells the code, and not the status.
const outcome = (call) => call().then(() => '200', (error) => {
    if (!error.code) throw error;
    return error.code;
});

async function main() {
    await it.createProject(project, { description: '' });
    const service_key = { enable: true, encrypt_type: 'default' };
    for (const [logstore, encrypt_conf] of [['mine', JSON.parse(process.argv[2])], ['other', service_key]]) {
        await createLogstore(it, project, logstore, { ttl: 3, shardCount: 1, encrypt_conf });
    }
    console.log('ready');
    for await (const line of readline.createInterface({ input: process.stdin })) {
        const word = line.trim();
        const mine = [
            await outcome(() => put(it, project, 'mine', word)),
            await outcome(() => texts('mine')),
        ];
        await put(it, project, 'other', word);
        console.log(JSON.stringify({ mine, other: await texts('other') }));
        console.log(JSON.stringify(mine[1] === '200' ? await texts('mine') : []));
    }
}

main().catch((error) => {
    console.error(error);
    process.exit(1);
});
