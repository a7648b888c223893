import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.Properties;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.TimeUnit;
import org.apache.kafka.clients.admin.Admin;
import org.apache.kafka.clients.admin.AlterConfigOp;
import org.apache.kafka.clients.admin.ConfigEntry;
import org.apache.kafka.clients.admin.NewPartitions;
import org.apache.kafka.clients.admin.NewTopic;
import org.apache.kafka.clients.admin.RecordsToDelete;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.config.ConfigResource;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.serialization.StringSerializer;

/** What a Java program does on an ordinary day: look around, produce (idempotent by default), consume in a group, tidy up. */
public final class Everyday {
    private static final int RECORDS = 2_000;

    public static void main(String[] args) throws Exception {
        Properties settings = new Properties();
        settings.put("bootstrap.servers", args[0]);
        settings.put("default.api.timeout.ms", "120000");
        settings.put("request.timeout.ms", "60000");
        String topic = "everyday-" + System.nanoTime();
        try (Admin admin = Admin.create(settings)) {
            check(admin.describeCluster().clusterId().get(60, TimeUnit.SECONDS) != null, "cluster id");
            check(admin.describeCluster().nodes().get(60, TimeUnit.SECONDS).size() == 1, "one node");
            admin.createTopics(List.of(new NewTopic(topic, Optional.of(2), Optional.empty()))).all().get(60, TimeUnit.SECONDS);
            admin.createPartitions(Map.of(topic, NewPartitions.increaseTo(3))).all().get(60, TimeUnit.SECONDS);
            check(admin.listTopics().names().get(60, TimeUnit.SECONDS).contains(topic), "topic is listed");
            check(admin.describeTopics(List.of(topic)).allTopicNames().get(60, TimeUnit.SECONDS).get(topic).partitions().size() == 3, "three partitions");
            var resource = new ConfigResource(ConfigResource.Type.TOPIC, topic);
            var config = admin.describeConfigs(List.of(resource)).all().get(60, TimeUnit.SECONDS).get(resource);
            check(config.get("cleanup.policy") != null && config.get("retention.ms") != null, "topic configuration");
            var kept = new AlterConfigOp(new ConfigEntry("retention.ms", "3600000"), AlterConfigOp.OpType.SET);
            admin.incrementalAlterConfigs(Map.of(resource, List.of(kept))).all().get(60, TimeUnit.SECONDS);
            config = admin.describeConfigs(List.of(resource)).all().get(60, TimeUnit.SECONDS).get(resource);
            check(config.get("retention.ms").value().equals("3600000"), "retention.ms was set");
            var reset = new AlterConfigOp(new ConfigEntry("retention.ms", null), AlterConfigOp.OpType.DELETE);
            admin.incrementalAlterConfigs(Map.of(resource, List.of(reset))).all().get(60, TimeUnit.SECONDS);
            config = admin.describeConfigs(List.of(resource)).all().get(60, TimeUnit.SECONDS).get(resource);
            check(config.get("retention.ms").isDefault(), "retention.ms is the default again");

            produce(settings, topic);
            consume(settings, topic);

            String group = "everyday";
            var committed = admin.listConsumerGroupOffsets(group).partitionsToOffsetAndMetadata().get(60, TimeUnit.SECONDS);
            long sum = committed.entrySet().stream().filter(e -> e.getKey().topic().equals(topic)).mapToLong(e -> e.getValue().offset()).sum();
            check(sum == RECORDS, "committed offsets add up to " + sum);
            var partition = new TopicPartition(topic, 0);
            long low = admin.deleteRecords(Map.of(partition, RecordsToDelete.beforeOffset(5))).lowWatermarks().get(partition).get(60, TimeUnit.SECONDS).lowWatermark();
            check(low == 5, "low watermark " + low);
            admin.deleteConsumerGroups(List.of(group)).all().get(60, TimeUnit.SECONDS);
            admin.deleteTopics(List.of(topic)).all().get(60, TimeUnit.SECONDS);
        }
        System.out.println("ok");
    }

    private static void produce(Properties base, String topic) throws Exception {
        Properties settings = new Properties();
        settings.putAll(base);
        settings.put("compression.type", "zstd");
        settings.put("linger.ms", "5");
        settings.put("delivery.timeout.ms", "120000");
        try (var producer = new KafkaProducer<>(settings, new StringSerializer(), new StringSerializer())) {
            for (int i = 0; i < RECORDS; i++) {
                var record = new ProducerRecord<>(topic, i % 3, "key-" + i % 7, "value-" + i);
                record.headers().add("n", Integer.toString(i).getBytes(StandardCharsets.UTF_8));
                producer.send(record, (metadata, error) -> {
                    if (error != null) {
                        error.printStackTrace();
                        System.exit(1);
                    }
                });
            }
            producer.flush();
        }
    }

    private static void consume(Properties base, String topic) {
        Properties settings = new Properties();
        settings.putAll(base);
        settings.put("group.id", "everyday");
        settings.put("auto.offset.reset", "earliest");
        settings.put("session.timeout.ms", "120000");
        settings.put("enable.auto.commit", "false");
        Set<String> seen = new TreeSet<>();
        try (var consumer = new KafkaConsumer<>(settings, new StringDeserializer(), new StringDeserializer())) {
            consumer.subscribe(Collections.singleton(topic));
            long deadline = System.nanoTime() + 180_000_000_000L;
            while (seen.size() < RECORDS && System.nanoTime() < deadline) {
                for (var record : consumer.poll(Duration.ofSeconds(1))) {
                    check(seen.add(record.value()), "a record came twice: " + record);
                    check(("value-" + new String(record.headers().lastHeader("n").value(), StandardCharsets.UTF_8)).equals(record.value()), "header of " + record);
                }
                consumer.commitSync();
            }
        }
        check(seen.size() == RECORDS, "records read: " + seen.size());
    }

    private static void check(boolean holds, String what) {
        if (!holds) {
            throw new AssertionError(what);
        }
    }
}
